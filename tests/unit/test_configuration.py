"""Settings as the servers write them: what is quoted how, and where in an ini it goes."""

from __future__ import annotations

from typing import Any

import pytest

from connlab.configuration import (
    PGBOUNCER_NAMES,
    POSTGRES_NAMES,
    Change,
    check_names,
    did_you_mean,
    ini_values,
    ini_with,
    pgbouncer_value,
    postgres_lines,
    postgres_value,
)
from connlab.errors import ConnlabError, SettingError
from connlab.pgbouncer import complete_ini
from connlab.runtime import Address

SERVER, LISTEN = Address("10.1.1.1", 5432), Address("127.0.0.1", 20001)


# --- values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (True, "on"),
        (False, "off"),
        (20, "20"),
        (-1, "-1"),
        (0.5, "0.5"),
        ("64MB", "'64MB'"),
        ("", "''"),
        ("it's", "'it''s'"),
        ("back\\slash", "'back\\\\slash'"),
        ("a # b", "'a # b'"),
    ],
)
def test_a_value_in_postgresql_conf(value: Any, written: str) -> None:
    assert postgres_value(value) == written


@pytest.mark.parametrize(
    ("value", "written"), [(True, "1"), (False, "0"), (20, "20"), (0.5, "0.5"), ("session", "session"), ("", "")]
)
def test_a_value_in_pgbouncer_ini(value: Any, written: str) -> None:
    assert pgbouncer_value(value) == written


@pytest.mark.parametrize("write", [postgres_value, pgbouncer_value])
@pytest.mark.parametrize("value", ["4MB\nfsync = off", "4MB\r", None, ["a"], b"a", {"a": 1}])
def test_what_is_no_value_is_refused(write: Any, value: Any) -> None:
    with pytest.raises(SettingError, match="a setting's value"):
        write(value)


def test_lines_of_postgresql_conf_stand_in_the_order_given() -> None:
    assert postgres_lines({"work_mem": "4MB", "fsync": False}) == "work_mem = '4MB'\nfsync = off\n"
    assert postgres_lines({}) == ""


# --- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["work_mem", "my_app.tenant", "TimeZone", "_x1"])
def test_names_that_may_be_settings_pass(name: str) -> None:
    check_names([name], {"port": "fixed"})


@pytest.mark.parametrize("name", ["", "work mem", "work-mem", "1st", "a=b", "a\nb", "[pgbouncer]", "größe"])
def test_names_that_can_be_none_are_refused(name: str) -> None:
    with pytest.raises(SettingError, match="is not the name of a setting"):
        check_names([name], {})


@pytest.mark.parametrize("name", ["port", "PORT", "Port"])
def test_a_refused_name_is_refused_with_the_reason_however_it_is_written(name: str) -> None:
    with pytest.raises(SettingError, match=f"{name} cannot be set here: it is fixed"):
        check_names(["work_mem", name], {"port": "it is fixed"})


def test_a_refused_setting_is_a_value_error_and_connlabs() -> None:
    assert issubclass(SettingError, ValueError) and issubclass(SettingError, ConnlabError)


def test_did_you_mean_names_what_is_close_and_nothing_else() -> None:
    assert did_you_mean("max_conections", ["max_connections", "port"]) == "did you mean max_connections?"
    assert did_you_mean("MAX_CONNECTION", ["max_connections", "port"]) == "did you mean max_connections?"
    assert did_you_mean("pool_siez", ["pool_size", "pool_sizes", "port"]) == "did you mean pool_size or pool_sizes?"
    assert did_you_mean("quite_unheard_of", ["max_connections", "port"]) == ""


@pytest.mark.parametrize("names", [POSTGRES_NAMES, PGBOUNCER_NAMES])
def test_the_names_to_guess_from_are_names(names: frozenset[str]) -> None:
    check_names(names, {})
    assert len(names) > 50


def test_a_change_says_what_it_did() -> None:
    change = Change("PostgreSQL", "reload", {"work_mem": "9MB", "jit": "off"}, {"work_mem": "4MB", "jit": "on"})
    assert str(change) == "PostgreSQL, reload: work_mem 4MB -> 9MB, jit on -> off"


# --- ini ----------------------------------------------------------------------------------------------------------


def test_settings_go_to_the_end_of_their_section() -> None:
    text = "[databases]\nshop = host=x\n\n[pgbouncer]\npool_mode = session\n\n[users]\napp = pool_mode=statement\n"
    assert ini_with(text, "pgbouncer", {"pool_mode": "transaction"}, "changed") == (
        "[databases]\nshop = host=x\n\n"
        "[pgbouncer]\npool_mode = session\n; changed\npool_mode = transaction\n\n"
        "[users]\napp = pool_mode=statement\n"
    )


@pytest.mark.parametrize("text", ["", "\n", "   \n"])
def test_an_empty_ini_gets_the_section(text: str) -> None:
    assert ini_with(text, "pgbouncer", {"pool_mode": "session"}) == "[pgbouncer]\npool_mode = session\n"


def test_a_missing_section_is_added() -> None:
    assert (
        ini_with("[databases]\n* = host=x", "pgbouncer", {"a": 1}) == "[databases]\n* = host=x\n\n[pgbouncer]\na = 1\n"
    )


def test_a_section_that_stands_twice_gets_them_where_they_win() -> None:
    text = "[pgbouncer]\na = 1\n[databases]\n* =\n[pgbouncer]\na = 2\n"
    assert ini_with(text, "pgbouncer", {"a": 3}).endswith("[pgbouncer]\na = 2\na = 3\n")
    assert ini_values(ini_with(text, "pgbouncer", {"a": 3}), "pgbouncer") == {"a": "3"}


@pytest.mark.parametrize(
    "text", ["[pgbouncer]\na = 1\n%include x.ini\n", "[pgbouncer]\n[databases]\n  %include x.ini\n"]
)
def test_what_an_included_file_says_does_not_win(text: str) -> None:
    assert ini_with(text, "pgbouncer", {"a": 3}).endswith("%include x.ini\n\n[pgbouncer]\na = 3\n")


def test_an_include_before_the_section_is_left_alone() -> None:
    text = "%include x.ini\n[pgbouncer]\na = 1\n"
    assert ini_with(text, "pgbouncer", {"a": 3}) == text + "a = 3\n"


def test_the_values_of_a_section_are_the_last_ones_and_no_comments() -> None:
    text = """
    ; pool_mode = statement
    [databases]
    shop = host=x port=1
    [ pgbouncer ]
    pool_mode=session
    # pool_mode = statement
    pool_mode = transaction ; so it is read: no comment stands behind a value
    empty =
    [users]
    app = pool_mode=session
    """
    assert ini_values(text, "pgbouncer") == {
        "pool_mode": "transaction ; so it is read: no comment stands behind a value",
        "empty": "",
    }
    assert ini_values(text, "databases") == {"shop": "host=x port=1"}
    assert ini_values(text, "peers") == {}


def test_a_text_from_windows_is_read() -> None:
    assert ini_values("[pgbouncer]\r\npool_mode = session\r\n", "pgbouncer") == {"pool_mode": "session"}


# --- what connlab adds to an ini ----------------------------------------------------------------------------------


def complete(text: str = "", **settings: Any) -> dict[str, str]:
    return ini_values(complete_ini(text, settings, SERVER, LISTEN), "pgbouncer")


def test_an_empty_ini_becomes_one_that_runs() -> None:
    assert complete() == {
        "listen_addr": "127.0.0.1",
        "listen_port": "20001",
        "unix_socket_dir": "",
        "auth_type": "scram-sha-256",
        "auth_file": "userlist.txt",
        "admin_users": "console",
    }
    databases = ini_values(complete_ini("", {}, SERVER, LISTEN), "databases")
    assert databases == {"shop": "host=10.1.1.1 port=5432", "*": "host=10.1.1.1 port=5432"}


def test_where_to_listen_and_log_is_not_the_texts_to_say() -> None:
    values = complete(
        "[pgbouncer]\nlisten_addr = *\nlisten_port = 6432\nunix_socket_dir = /tmp\n"
        "logfile = /x\npidfile = /y\nuser = z\n"
    )
    assert (values["listen_addr"], values["listen_port"]) == ("127.0.0.1", "20001")
    assert [values[name] for name in ("unix_socket_dir", "logfile", "pidfile", "user")] == [""] * 4


def test_whom_to_let_in_is_the_texts_to_say_and_the_console_besides() -> None:
    values = complete("[pgbouncer]\nauth_type = md5\nauth_file = mine.txt\nadmin_users = app, boss\n")
    assert (values["auth_type"], values["auth_file"]) == ("md5", "mine.txt")
    assert values["admin_users"] == "app, boss, console"


@pytest.mark.parametrize("method", ["trust", "any"])
def test_a_method_without_passwords_is_refused(method: str) -> None:
    with pytest.raises(SettingError, match="asks for no password"):
        complete(auth_type=method)
    with pytest.raises(SettingError, match="asks for no password"):
        complete(f"[pgbouncer]\nauth_type={method}\n")


@pytest.mark.parametrize(
    ("given", "names"),
    [("shop = host=x", {"shop"}), ("* = host=x", {"*"}), ("other = host=x", {"other", "shop"})],
)
def test_the_sample_database_is_added_where_the_text_leads_nowhere(given: str, names: set[str]) -> None:
    text = complete_ini(f"[databases]\n{given}\n", {}, SERVER, LISTEN)
    assert set(ini_values(text, "databases")) == names and given in text
