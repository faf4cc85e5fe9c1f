"""What authors rely on: a notebook that did not really run, or that the run did not see, makes the run fail.

Each test writes tiny notebooks and runs pytest on them, with this project's own conftest and `addopts`.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import nbformat.v4
import psutil
import pytest

from connlab import labs

CLOSING_LINE = re.compile(r"=+ .* in [0-9.]+s.* =+")

Cell = str | tuple[str, str]
"""A cell's source, or its source and one tag."""


class Course:
    """A project like this one, with notebooks to be written into it."""

    def __init__(self, pytester: pytest.Pytester, config: pytest.Config) -> None:
        self.pytester = pytester
        pytester.makeconftest((config.rootpath / "conftest.py").read_text())
        pytester.makeini(
            f"[pytest]\ntestpaths = tests notebooks\npythonpath = {Path(__file__).parent}\n"
            f"markers =\n    full: everything\n    part: some of it\naddopts = {shlex.join(config.getini('addopts'))}\n"
        )
        (pytester.mkdir("tests") / "test_plain.py").write_text("def test_plain(): pass\n")

    def add(self, path: str, *cells: Cell) -> None:
        """Write a notebook with these code cells."""
        file = self.pytester.path / path
        file.parent.mkdir(exist_ok=True)
        notebook = nbformat.v4.new_notebook(cells=[_code_cell(cell) for cell in cells])
        file.write_text(nbformat.v4.writes(notebook))

    def run(self, *args: str) -> pytest.RunResult:
        """Run pytest there, in this process."""
        return self.pytester.runpytest_inprocess("--color=no", *args)


def _code_cell(cell: Cell) -> nbformat.NotebookNode:
    source, tags = (cell, []) if isinstance(cell, str) else (cell[0], [cell[1]])
    return nbformat.v4.new_code_cell(source, metadata={"tags": tags} if tags else {})


@pytest.fixture
def course(pytester: pytest.Pytester, pytestconfig: pytest.Config) -> Course:
    return Course(pytester, pytestconfig)


# A healthy course


def test_a_healthy_course_passes_whole_and_ends_on_the_closing_line(course: Course) -> None:
    course.add(
        "notebooks/healthy.ipynb",
        "assert '_set_up' not in globals()",
        "%time x = 1\n!true\n%matplotlib --list",
        "def say():\n    word = 'hi'\n    said = !echo {word}\n    return said\nassert say() == ['hi']",
        ("1/0", "raises-exception"),
        "%%bash\ntrue",
    )
    result = course.run()
    result.assert_outcomes(passed=6)
    assert result.ret == pytest.ExitCode.OK
    assert CLOSING_LINE.fullmatch(result.outlines[-1])


def test_this_very_run_is_guarded(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.pluginmanager.hasplugin("notebook_guard")
    assert pytestconfig.option.nbval_lax


# Cells that did not do what they seem to do


@pytest.mark.parametrize(
    "cell", [("1/0", "nbval-skip"), "# NBVAL_SKIP\n1/0", ("1/0", "skip-execution")], ids=["tag", "comment", "nbclient"]
)
def test_a_cell_marked_to_be_skipped_is_refused(course: Course, cell: Cell) -> None:
    course.add("notebooks/one.ipynb", cell)
    result = course.run()
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["notebooks/one.ipynb::Cell 0 is marked to be skipped*"])


NO_MAGIC = "UsageError: Line magic function `%nosuch` not found."
FAILED_COMMAND = "CalledProcessError: Command 'false' returned non-zero exit status 1."
NOT_RAISED = "expected an exception, none was raised"

SEEMING_SUCCESSES: list[tuple[Cell, str]] = [
    ("%nosuch", NO_MAGIC),
    ("%%nosuch\nx = 1", "UsageError: Cell magic `%%nosuch` not found."),
    ("%%capture\n%nosuch", NO_MAGIC),
    (("%nosuch", "raises-exception"), NO_MAGIC),
    ("!false", FAILED_COMMAND),
    ("x = !false", FAILED_COMMAND),
    (("1 + 1", "raises-exception"), NOT_RAISED),
    (("!false", "raises-exception"), NOT_RAISED),  # which raises nothing for a learner either
    ("exit()", "the cell asks the kernel to exit"),
]


def test_cells_that_nbval_alone_lets_pass_fail_and_say_why(course: Course) -> None:
    course.add("notebooks/one.ipynb", *(cell for cell, _ in SEEMING_SUCCESSES))
    # A kernel for each would take 20 s: here, cells go on after a failure.
    course.pytester.makepyfile(go_on="def pytest_runtest_setup(item): item.parent.first_failure = None")
    course.pytester.syspathinsert()
    result = course.run("-p", "go_on", "-k", "Cell")
    said = [str(report.longrepr).splitlines()[0] for report in _failed_cells(result)]
    assert said == [message for _, message in SEEMING_SUCCESSES]
    assert result.ret == pytest.ExitCode.TESTS_FAILED


def _failed_cells(result: pytest.RunResult) -> list[pytest.TestReport]:
    reports = result.reprec.getreports("pytest_runtest_logreport")
    return [report for report in reports if report.failed]


def test_a_timeout_is_not_the_expected_exception(course: Course) -> None:
    course.add("notebooks/slow.ipynb", ("import time\ntime.sleep(60)", "raises-exception"))
    result = course.run("--nbval-cell-timeout=1")
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["the cell ran into the timeout*"])


# Dead kernels


def test_a_kernel_that_dies_is_noticed_at_once_and_its_stderr_shown(
    course: Course, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    last_words = "os.write(sys.__stderr__.fileno(), b'last ' + b'words')"
    die = "os.kill(os.getpid(), signal.SIGKILL)"
    course.add("notebooks/one.ipynb", "import os, signal, sys", f"{last_words}\n{die}", "1", "2")
    result = course.run()
    result.assert_outcomes(passed=2, failed=1, skipped=2)
    result.stdout.fnmatch_lines(
        [
            "the kernel died in this cell (killed by SIGKILL)",
            "Cell 1: the kernel died*",
            "*last words*",
            "SKIPPED [[]2[]]*not run: notebooks/one.ipynb::Cell 1 failed",
        ]
    )
    result.stdout.no_fnmatch_line("*IPKernelApp*")  # what every kernel says as it starts is no news
    assert _failed_cells(result)[0].duration < 3
    assert not list(tmp_path.glob("*.json")), "its connection file is still there"


def test_a_kernel_that_cannot_start_fails_once_and_says_why(course: Course, monkeypatch: pytest.MonkeyPatch) -> None:
    course.add("notebooks/one.ipynb", "1", "2")
    (course.pytester.path / "ipykernel_launcher.py").write_text("raise OSError('no kernel today')\n")
    monkeypatch.setenv("PYTHONPATH", str(course.pytester.path))
    result = course.run("-k", "Cell")
    result.assert_outcomes(failed=1, skipped=1, deselected=1)
    result.stdout.fnmatch_lines(["OSError: no kernel today"])


# After the first failure


def test_cells_after_a_failure_are_skipped_and_say_why_in_that_notebook_only(course: Course) -> None:
    course.add("notebooks/a.ipynb", "pass", "assert 1 == 2, 'no longer true'", "open('ran', 'w')")
    course.add("notebooks/b.ipynb", "pass")
    result = course.run()
    result.assert_outcomes(passed=3, failed=1, skipped=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert not (course.pytester.path / "notebooks/ran").exists()
    result.stdout.fnmatch_lines(
        ["SKIPPED*not run: notebooks/a.ipynb::Cell 1 failed", "FAILED*Cell 1 - AssertionError: no longer true"]
    )


# Solutions and labs


CHECK = """
from connlab.checks.drivers import call
from connlab.checks.sandbox import Sandbox
from connlab.checks.trial import check
@check("It works")
def works(trial, act):
    "Write it."
    with Sandbox(act=act) as box:
        answer = box.do(30, call, "act")
    trial.expect("1", str(answer.value), answer.value == 1, "Return 1.")
"""
STUB = "def act():\n    # YOUR CODE HERE\n    raise NotImplementedError()"
PASSED, OPEN = "✓ Passed", "○ Not solved yet"


def add_lab(course: Course, path: str, act: str, *, worked_on: bool = False) -> None:
    """A notebook whose last cell is a check."""
    course.add(path, CHECK, act, "works(act)")
    file = course.pytester.path / path
    notebook = nbformat.read(file, as_version=4)
    notebook.cells[2].metadata["nbgrader"] = {"grade": True}
    notebook.metadata["connlab"] = {"derived": "of another text" if worked_on else labs.digest(notebook)}
    nbformat.write(notebook, file)


@pytest.mark.parametrize(
    ("folder", "act", "said"),
    [
        ("solutions", "def act(): return 1", ""),
        ("solutions", "def act(): return 2", f"a check of a solution does not say '{PASSED}'"),
        ("solutions", STUB, f"a solution says '{OPEN}'"),
        ("labs", STUB, ""),
        ("labs", "def act(): return 2", f"a check of a lab that nobody has worked in does not say '{OPEN}'"),
        ("labs", "def act(): return 1", f"a check of a lab that nobody has worked in does not say '{OPEN}'"),
    ],
)
def test_checks_pass_in_solutions_and_are_open_in_labs(course: Course, folder: str, act: str, said: str) -> None:
    add_lab(course, f"{folder}/lab_02.ipynb", act)
    result = course.run(folder)
    result.assert_outcomes(passed=2 if said else 3, failed=1 if said else 0)
    if said:
        result.stdout.fnmatch_lines([said])


def test_a_lab_that_somebody_works_in_is_left_alone(course: Course) -> None:
    add_lab(course, "labs/lab_02.ipynb", "def act(): return 2", worked_on=True)
    course.run("labs").assert_outcomes(passed=3)


# Notebooks that the run did not see


@pytest.mark.parametrize("extra", [(), ("--collect-only", "-q"), ("-m", "full")], ids=["run", "collect-only", "full"])
def test_a_run_that_misses_a_notebook_fails_and_names_it(course: Course, extra: tuple[str, ...]) -> None:
    course.add("notebooks/seen.ipynb", "pass")
    course.add("labs/unseen.ipynb", "pass")  # not in testpaths
    course.add("notebooks/empty.ipynb")
    course.add("elsewhere/tracked.ipynb", "pass")
    course.add("elsewhere/untracked.ipynb", "pass")
    for command in (["git", "init", "-q"], ["git", "add", "elsewhere/tracked.ipynb"]):
        subprocess.run(command, cwd=course.pytester.path, check=True)
    result = course.run(*extra)
    assert result.ret not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
    result.stdout.fnmatch_lines(
        ["3 notebook(s) of the course*", "  elsewhere/tracked.ipynb", "  labs/unseen.ipynb", "  notebooks/empty.ipynb"]
    )
    assert "seen.ipynb" not in result.stdout.str().split("not collected with any cell")[1].replace("unseen", "")


def test_the_count_is_kept_when_addopts_leaves_notebooks_out(course: Course) -> None:
    course.add("notebooks/one.ipynb", "pass")
    ini = course.pytester.path / "tox.ini"
    ini.write_text(ini.read_text().rstrip() + " -k plain\n")
    result = course.run()
    result.stdout.fnmatch_lines(["  notebooks/one.ipynb"])
    assert result.ret != pytest.ExitCode.OK


@pytest.mark.parametrize("part", [("tests",), ("-k", "plain"), ("-m", "not part"), ("--lf",)], ids=" ".join)
def test_a_part_of_the_course_may_be_run_alone(course: Course, part: tuple[str, ...]) -> None:
    course.add("labs/unseen.ipynb", "pass")
    result = course.run(*part)
    result.assert_outcomes(passed=1)
    assert result.ret == pytest.ExitCode.OK


# Interrupted runs


@pytest.fixture
def stuck(course: Course) -> Iterator[tuple[subprocess.Popen[bytes], psutil.Process]]:
    """A pytest process in the middle of a cell, and the kernel that runs the cell."""
    course.add("notebooks/long.ipynb", "import os, time\nopen('pid', 'w').write(f'{os.getpid()}.')\ntime.sleep(60)")
    with (course.pytester.path / "out").open("wb") as out:
        run = course.pytester.popen([sys.executable, "-m", "pytest", "--color=no"], stdout=out, stderr=out)
    kernel = psutil.Process(_kernel_pid(course.pytester.path / "notebooks/pid"))
    yield run, kernel
    for process in (run, kernel):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    run.wait()


def _kernel_pid(file: Path) -> int:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if file.exists() and (text := file.read_text()).endswith("."):
            return int(text[:-1])
        time.sleep(0.05)
    raise TimeoutError("the cell did not begin")


def _is_gone(process: psutil.Process) -> bool:
    """Ended; a zombie has, though who adopted it may not have collected it yet."""
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_an_interrupt_leaves_no_kernel_and_ends_on_the_closing_line(
    course: Course, stuck: tuple[subprocess.Popen[bytes], psutil.Process]
) -> None:
    run, kernel = stuck
    run.send_signal(signal.SIGINT)
    assert run.wait(timeout=20) == pytest.ExitCode.INTERRUPTED
    # At once: only the run itself can have ended it, ipykernel's own watch takes a second.
    assert _is_gone(kernel)
    assert CLOSING_LINE.fullmatch((course.pytester.path / "out").read_text().splitlines()[-1])


def test_a_killed_run_leaves_no_kernel(stuck: tuple[subprocess.Popen[bytes], psutil.Process]) -> None:
    run, kernel = stuck
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    deadline = time.monotonic() + 10
    while not _is_gone(kernel) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert _is_gone(kernel)
