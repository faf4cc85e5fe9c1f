"""The command line: help, mistakes, exit codes, progress, and what `clean --cache` spares."""

import io
import os
import re
import subprocess
import sys
import time

import pytest

from connlab import browser, cleaning, cli, doctor, jupyter, places, programs, progress
from connlab.errors import ConnlabError, ProgramMissing

COMMANDS = ("start", "doctor", "demo", "claims", "labs", "clean")
HEAVY = ("jupyter", "tornado", "traitlets", "ipykernel", "psycopg", "asyncio")


def connlab(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "connlab.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def help_of(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


# --- help and mistakes --------------------------------------------------------------------------------------


def test_the_top_help_names_every_command_and_every_exit_code(capsys):
    text = help_of(capsys=capsys)
    for command in COMMANDS:
        assert f"\n    {command} " in text
    listed = {int(line.split()[0]) for line in text.splitlines() if line.strip()[:1].isdigit()}
    assert listed == {cli.FINE, cli.FAILED, cli.WRONG_USE, cli.NO_BACKEND, cli.PORT_TAKEN, cli.INTERRUPTED}


@pytest.mark.parametrize("command", COMMANDS)
def test_each_help_explains_and_gives_examples_that_are_valid(command, capsys):
    text = help_of(command, capsys=capsys)
    examples = [
        line.partition("connlab ")[2] for line in text.partition("examples:")[2].splitlines() if "connlab" in line
    ]
    examples = [example.partition("  ")[0].split() for example in examples if example.startswith(command)]
    assert examples
    for words in examples:
        assert cli.parser().parse_args(words).command == command


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_and_version_import_nothing_heavy(command):
    """`import connlab` is the package's own business; the command line adds nothing to it."""
    script = f"""
import sys, contextlib, io
import connlab
before = set(sys.modules)
from connlab import cli
for words in ({command} + ["--help"], ["--version"]):
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        cli.main(words)
print(*(set(sys.modules) - before))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    added = done.stdout.split()
    assert [name for name in added if name.startswith(HEAVY)] == []


@pytest.mark.parametrize(
    "words",
    [[], ["begin"], ["start", "--port", "0"], ["start", "--port", "x"], ["start", "--port", "65536"], ["demo", "x"]],
)
def test_wrong_use_is_exit_code_2_and_says_what_was_wrong(words, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == cli.WRONG_USE
    assert (words[-1] if words else "COMMAND") in capsys.readouterr().err


def test_version_prints_one_line():
    done = connlab("--version")
    assert done.returncode == 0
    assert done.stdout.split()[0] == "connlab"
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize(
    ("problem", "code"),
    [
        (ConnlabError("it broke"), cli.FAILED),
        (ProgramMissing("no PostgreSQL", ["here"], ["get one"]), cli.NO_BACKEND),
        (jupyter.PortTaken(8888, "somebody is there"), cli.PORT_TAKEN),
    ],
)
def test_an_error_ends_with_its_message_and_code_and_no_traceback(problem, code, monkeypatch, capsys):
    def fail(_given: object) -> int:
        raise problem

    monkeypatch.setattr(cli, "_demo", fail)
    assert cli.main(["demo"]) == code
    said = capsys.readouterr().err
    assert said == f"connlab demo: {problem}\n"


def test_ctrl_c_is_no_traceback(monkeypatch, capsys):
    def interrupted(_given: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_demo", interrupted)
    assert cli.main(["demo"]) == cli.INTERRUPTED
    assert "Traceback" not in capsys.readouterr().err


def test_output_that_nobody_reads_is_no_traceback():
    command = f"{sys.executable} -m connlab.cli doctor | true"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""


def test_a_terminal_that_knows_no_ticks_still_gets_the_findings():
    done = subprocess.run(
        [sys.executable, "-m", "connlab.cli", "doctor"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "PostgreSQL" in done.stdout
    assert "Traceback" not in done.stderr


# --- progress -----------------------------------------------------------------------------------------------


@pytest.fixture
def screen(monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 0.05)
    return io.StringIO()


def test_what_is_quick_is_not_announced(screen):
    with progress.Progress(screen).step("Blinking"):
        pass
    assert screen.getvalue() == ""


def test_what_takes_long_is_one_line_with_its_seconds(screen):
    with progress.Progress(screen).step("Sleeping"):
        time.sleep(0.15)
    assert re.fullmatch(r"Sleeping … done in \d+\.\d s\n", screen.getvalue())


def test_what_fails_is_not_called_done(screen):
    with pytest.raises(ValueError), progress.Progress(screen).step("Sleeping"):
        time.sleep(0.15)
        raise ValueError
    assert "failed after" in screen.getvalue()
    assert "done" not in screen.getvalue()


def test_lines_during_a_step_stand_alone(screen):
    shown = progress.Progress(screen)
    with shown.step("Sleeping"):
        time.sleep(0.15)
        shown.say("Fetching")
    assert screen.getvalue().splitlines()[:2] == ["Sleeping … ", "Fetching"]
    assert screen.getvalue().splitlines()[2].startswith("Sleeping: done in")


# --- the browser --------------------------------------------------------------------------------------------


@pytest.fixture
def nowhere(monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "WSL_DISTRO_NAME", "BROWSER"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS always has a desktop")
def test_no_browser_is_opened_where_there_is_no_desktop(nowhere, tmp_path):
    assert "no desktop" in browser.open_browser("http://127.0.0.1/", tmp_path / "page.html")


@pytest.mark.skipif(sys.platform == "darwin", reason="WSL is Linux")
def test_under_wsl_windows_opens_the_address(nowhere, monkeypatch, tmp_path):
    opener = tmp_path / "explorer.exe"
    opener.write_text(f'#!/bin/sh\necho "$1" > {tmp_path}/opened.part && mv {tmp_path}/opened.part {tmp_path}/opened\n')
    opener.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("WSL_DISTRO_NAME", "Debian")
    assert browser.open_browser("http://127.0.0.1:1/lab", tmp_path / "page.html") == ""
    deadline = time.monotonic() + 10
    while not (tmp_path / "opened").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (tmp_path / "opened").read_text() == "http://127.0.0.1:1/lab\n"


# --- the doctor ---------------------------------------------------------------------------------------------


def test_the_doctor_fetches_nothing(monkeypatch, tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("apt-get", "curl", "brew"):
        (tools / name).write_text(f"#!/bin/sh\necho {name} >> {tmp_path}/called\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.delenv("CONNLAB_PGBOUNCER", raising=False)
    monkeypatch.setattr(programs, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr(programs, "_system_pgbouncers", list)
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
    found = doctor.look()
    assert not (tmp_path / "called").exists()
    assert found.pgbouncer is None
    assert not found.backends["local"].usable
    assert "Ways out" in found.backends["local"].why


def test_an_old_pgbouncer_is_told_what_it_lacks(monkeypatch, tmp_path):
    for version, lacks in (("1.20.1", True), ("1.21.0", False)):
        program = tmp_path / version
        program.write_text(f"#!/bin/sh\necho PgBouncer {version}\n")
        program.chmod(0o755)
        monkeypatch.setattr(programs, "_require_readable", lambda _: None)
        monkeypatch.setattr(programs, "server_account", lambda: None)
        monkeypatch.setenv("CONNLAB_PGBOUNCER", str(program))
        text = doctor.as_text(doctor.look())
        assert f"✓ PgBouncer {version}" in text
        assert ("no prepared statements in transaction mode" in text) == lacks
        assert ("CONNLAB_PGBOUNCER" in text.partition("no prepared")[2]) == lacks


# --- clean --cache ------------------------------------------------------------------------------------------

HOLD = """
import sys
from pathlib import Path
from connlab import reaper
lock = Path(sys.argv[1])
lock.parent.mkdir(parents=True, exist_ok=True)
held = reaper.lock_file(lock, wait=True)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """A cache of our own: emptying the real one would cost everybody a download."""
    place = tmp_path / "cache"
    (place / "templates" / "18.6-x" / "data").mkdir(parents=True)
    (place / "templates" / "18.6-x" / "data" / "PG_VERSION").write_text("18\n")
    monkeypatch.setattr(places, "cache_dir", lambda: place)
    monkeypatch.setattr(places, "run_roots", lambda: [tmp_path / "run", place / "run"])
    return place


def while_locked(lock, check) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        check(holder.pid)
        holder.stdin.close()


def test_clean_cache_removes_it_and_leaves_no_lock(cache):
    assert "removed the cache" in cleaning.remove_cache()
    assert not cache.exists()
    assert not (cache.parent / "run").exists()


def test_clean_cache_spares_it_while_somebody_runs_servers(cache):
    def check(_pid: int) -> None:
        with pytest.raises(ConnlabError, match="process 4242"):
            cleaning.remove_cache()
        assert (cache / "templates" / "18.6-x" / "data" / "PG_VERSION").exists()

    while_locked(cache.parent / "run" / "4242-abc" / "lock", check)


def test_clean_cache_spares_it_while_something_is_being_put_there(cache):
    def check(_pid: int) -> None:
        with pytest.raises(ConnlabError, match="being put"):
            cleaning.remove_cache()
        assert (cache / "templates" / "18.6-x" / "data" / "PG_VERSION").exists()

    while_locked(cache / "templates" / "18.6-x.lock", check)
