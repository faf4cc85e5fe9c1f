"""A pytest plugin that closes the blind spots of nbval 0.11, so that a green notebook has really run.

A notebook fails that
- skips a cell (`nbval-skip`, `NBVAL_SKIP`, `skip-execution`),
- uses an unknown magic, or a shell command of which fails (`!false`),
- expects an exception (`raises-exception`) that is not raised,
- runs into the cell timeout and swallows the interrupt,
- leaves the kernel (`exit()`) or kills it: noticed within a second, not after the cell timeout.

In a solution, every check has passed; in a lab that nobody has worked in, every check says "Not solved yet".

After a notebook's first failure its other cells are skipped. A run that was given no path and no -k or -m fails
when a notebook of the course was not collected. Nothing here changes how a healthy notebook runs.
"""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import nbval.plugin
import pytest
from nbval.plugin import IPyNbCell, IPyNbFile, NbCellError
from notebook_kernel import KernelDied, WatchedKernel

from connlab import labs
from connlab.checks.results import HEADINGS, OPEN, PASSED

COURSE_FOLDERS = ("notebooks", "labs", "solutions")
SKIP_TAG = "skip-execution"  # nbclient's; nbval's own marks are known to nbval


class GuardedNotebook(IPyNbFile):
    """nbval's notebook, with a watched kernel, and a memory of the first cell that failed."""

    first_failure: str | None = None

    def collect(self) -> Iterator[GuardedCell]:
        for cell in super().collect():
            yield GuardedCell.from_parent(
                self, name=cell.name, cell_num=cell.cell_num, cell=cell.cell, options=cell.options
            )

    def setup(self) -> None:
        """Start nothing: pytest would repeat a failure of this for each cell."""

    def start_kernel_once(self) -> None:
        """Start the kernel, for the first cell that needs it."""
        if self.kernel is None:
            with mock.patch.object(nbval.plugin, "RunningKernel", WatchedKernel):
                super().setup()

    def teardown(self) -> None:
        super().teardown()
        if self.kernel is not None:
            self.kernel.stop()  # nbval leaves the connection file and the sockets of a dead one


class GuardedCell(IPyNbCell):
    """nbval's cell, with what nbval overlooks made a failure."""

    def setup(self) -> None:
        if self.parent.first_failure:
            raise pytest.skip.Exception(f"not run: {self.parent.first_failure}", _use_item_location=True)

    def runtest(self) -> None:
        with self._failure_noted():
            self._refuse_to_be_skipped()
            self.parent.start_kernel_once()
            self._run_while_kernel_lives()
            self._refuse_what_nbval_overlooks()

    @contextmanager
    def _failure_noted(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.parent.first_failure = f"{self.nodeid} failed"
            if self.parent.kernel is not None and self.parent.kernel.tail:
                self.add_report_section("call", "stderr of the kernel", self.parent.kernel.tail)
            raise

    def _refuse_to_be_skipped(self) -> None:
        if self.options["skip"] or SKIP_TAG in self.cell.metadata.get("tags", []):
            self.raise_cell_error(f"{self.nodeid} is marked to be skipped: every cell of the course runs")

    def _run_while_kernel_lives(self) -> None:
        kernel = self.parent.kernel
        if not kernel.is_alive():
            self.raise_cell_error(f"the kernel was dead before this cell began ({kernel.how_it_ended})")
        try:
            # Where an exception is expected, a failed command must not stand in for it: learners' IPython raises none.
            kernel.set_up(strict=not self.options["check_exception"])
            super().runtest()
        except KernelDied as death:
            self.raise_cell_error(f"the kernel died in this cell ({death})")

    def _refuse_what_nbval_overlooks(self) -> None:
        complaint = self._overlooked()
        if complaint:
            self.raise_cell_error(complaint)

    def _overlooked(self) -> str | None:
        error, reply = self._error(), self.parent.kernel.reply
        if self.parent.timed_out:
            return "the cell ran into the timeout, and the interrupt did not make it fail"
        if error and error.ename == "UsageError":
            return f"UsageError: {error.evalue}"
        if self.options["check_exception"] and not error:
            return "expected an exception, none was raised"
        if reply["status"] != "ok" and not error:
            return f"the kernel says that the cell failed: {reply.get('ename')}: {reply.get('evalue')}"
        if any(item.get("source") == "ask_exit" for item in reply.get("payload", [])):
            return "the cell asks the kernel to exit"
        return self._wrong_for_its_folder()

    def _wrong_for_its_folder(self) -> str | None:
        """What the cell shows though it stands in a solution, or in a lab as it was derived."""
        text, is_check = self._shown(), self.cell.metadata.get("nbgrader", {}).get("grade")
        folder = self.parent.path.parent.name
        if folder == labs.SOLUTIONS and HEADINGS[OPEN] in text:
            return f"a solution says '{HEADINGS[OPEN]}'"
        if folder == labs.SOLUTIONS and is_check and HEADINGS[PASSED] not in text:
            return f"a check of a solution does not say '{HEADINGS[PASSED]}'"
        if folder == labs.LABS and is_check and HEADINGS[OPEN] not in text and labs.is_as_derived(self.parent.nb):
            return f"a check of a lab that nobody has worked in does not say '{HEADINGS[OPEN]}'"
        return None

    def _shown(self) -> str:
        """The text of the cell's outputs."""
        outputs = self.test_outputs or []
        return "\n".join(out.get("text", "") + out.get("data", {}).get("text/plain", "") for out in outputs)

    def _error(self) -> Any | None:
        """The error among the cell's outputs."""
        return next((out for out in self.test_outputs or [] if out.output_type == "error"), None)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException]) -> str:
        """nbval's report under a first line that says why: pytest's summary shows that line."""
        notes = getattr(excinfo.value, "__notes__", [])
        return "\n".join([self._reason(excinfo.value), "", super().repr_failure(excinfo), *notes])

    def _reason(self, failure: BaseException) -> str:
        error = self._error()
        if isinstance(failure, NbCellError) and failure.inner_traceback and error and not self.parent.timed_out:
            return f"{error.ename}: {error.evalue}".splitlines()[0]
        return str(failure)


@pytest.hookimpl(wrapper=True)
def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> Iterator[None]:
    """Put the guarded notebook in the place of nbval's."""
    collectors = yield
    return [_guarded(collector) for collector in collectors]


def _guarded(collector: pytest.Collector) -> pytest.Collector:
    if isinstance(collector, IPyNbFile):
        return GuardedNotebook.from_parent(collector.parent, path=collector.path)
    return collector


@pytest.hookimpl(tryfirst=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Report notebooks of which no cell was collected, as pytest reports a file that it cannot collect."""
    if _is_whole_run(session.config) and (missing := _missing(session)):
        session.ihook.pytest_collectreport(report=_collection_error(missing))


def _is_whole_run(config: pytest.Config) -> bool:
    """True when nobody asked for a part: no path, no -k or -m of the user's, no --lf or --sw.

    What `addopts` in pyproject.toml selects does not count as asked for: it would switch the guard off for good. `-m
    full` asks for everything.
    """
    at_root = config.invocation_params.dir == config.rootpath
    option = config.option
    keyword, marks = _selected_by_addopts(config)
    narrowed = option.keyword != keyword or option.markexpr not in (marks, "full")
    remembered = getattr(option, "lf", False) or getattr(option, "stepwise", False)
    return at_root and config.args_source is not config.ArgsSource.ARGS and not narrowed and not remembered


def _selected_by_addopts(config: pytest.Config) -> tuple[str, str]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-k", default="")
    parser.add_argument("-m", default="")
    chosen, _ = parser.parse_known_args(config.getini("addopts"))
    return chosen.k, chosen.m


def _missing(session: pytest.Session) -> list[Path]:
    collected = {item.path.resolve() for item in session.items}
    root = session.config.rootpath
    return [path for path in course_notebooks(root) if (root / path).resolve() not in collected]


def _collection_error(missing: Sequence[Path]) -> pytest.CollectReport:
    names = "\n".join(f"  {path.as_posix()}" for path in missing)
    return pytest.CollectReport(
        nodeid="notebooks",
        outcome="failed",
        longrepr=f"{len(missing)} notebook(s) of the course were not collected with any cell:\n{names}\n"
        "Is the folder in testpaths, does --nbval-lax stand in addopts, has the notebook a code cell?",
        result=[],
    )


def course_notebooks(root: Path) -> list[Path]:
    """Every notebook that git tracks under `root` or that lies in a folder of the course, relative to `root`."""
    return sorted(tracked_notebooks(root) | _lying_notebooks(root))


def tracked_notebooks(root: Path) -> set[Path]:
    """The notebooks that git tracks under `root`; none where there is no git or no repository."""
    try:
        listing = subprocess.run(
            ["git", "ls-files", "-z", "--", "*.ipynb"], cwd=root, capture_output=True, check=True, text=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return set()
    return {Path(name) for name in listing.split("\0") if name}


def _lying_notebooks(root: Path) -> set[Path]:
    found = (path for folder in COURSE_FOLDERS for path in (root / folder).rglob("*.ipynb"))
    return {path.relative_to(root) for path in found if ".ipynb_checkpoints" not in path.parts}
