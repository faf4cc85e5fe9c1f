"""Versions: found in what programs print, compared with tuples, printed as servers write them."""

from __future__ import annotations

import pickle

import pytest

from connlab import ConnlabError, Version


@pytest.mark.parametrize(
    ("printed", "version"),
    [
        ("postgres (PostgreSQL) 18.6", "18.6"),
        ("postgres (PostgreSQL) 15.14 (Debian 15.14-0+deb12u1)", "15.14"),
        ("postgres (PostgreSQL) 19devel", "19"),
        ("postgres (PostgreSQL) 18beta2", "18"),
        ("postgres (PostgreSQL) 18rc1", "18"),
        ("PgBouncer 1.18.0\nlibevent 2.1.12-stable\nadns: c-ares 1.18.1", "1.18.0"),
        ("PgBouncer 1.24.1", "1.24.1"),
    ],
)
def test_the_version_is_found_in_what_a_program_prints(printed: str, version: str) -> None:
    assert str(Version.find(printed)) == version


@pytest.mark.parametrize("printed", ["", "command not found", "version 7"])
def test_a_text_without_a_version_is_told(printed: str) -> None:
    with pytest.raises(ConnlabError, match="no version number in") as caught:
        Version.find(printed)
    assert repr(printed) in str(caught.value)


def test_versions_compare_number_by_number_with_tuples_and_each_other() -> None:
    version = Version.find("PgBouncer 1.9.0")
    assert version < (1, 21) and version < Version((1, 18)) and version >= (1, 9)
    assert version == (1, 9, 0) and version != (1, 9, 1)
    assert (1, 25, 1) <= Version((1, 25, 1)) <= (1, 25, 2)
    assert max([Version((15, 14)), Version((18, 6)), Version((9, 6))]) == (18, 6)


def test_a_version_is_a_key_and_can_be_sent_to_another_process() -> None:
    version = Version((18, 6))
    assert {version: "new"}[Version((18, 6))] == "new"
    assert pickle.loads(pickle.dumps(version)) == version
    assert type(pickle.loads(pickle.dumps(version))) is Version


def test_a_version_prints_as_servers_write_it() -> None:
    version = Version((18, 6))
    assert f"PostgreSQL {version}" == "PostgreSQL 18.6"
    assert repr(version) == "Version('18.6')"
    assert version[0] == 18
