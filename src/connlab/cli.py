"""The command `connlab`.

Nothing heavy is imported before a command runs: help and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TextIO, cast

from connlab.errors import ConnlabError, ProgramMissing

FINE, FAILED, WRONG_USE, NO_BACKEND, PORT_TAKEN = range(5)
INTERRUPTED = 128 + signal.SIGINT

TOP = """\
The command line of the course on PostgreSQL connections.

Start with `connlab start`: it opens the course in JupyterLab. If that fails, `connlab doctor` says what is
missing. Every server that a command or a notebook starts is a real one, listens on 127.0.0.1 alone, and
ends with the process that started it.
"""
EXIT_CODES = """\
exit codes:
  0    fine
  1    something failed; the message says what
  2    wrong use: a command, an option or its value is not known
  3    no backend usable: PostgreSQL or PgBouncer is not to be had; the ways out are listed
  4    the port that was asked for is taken
  130  interrupted with Ctrl-C before the work was done

`connlab COMMAND --help` explains a command, with examples.
"""
START = """\
Open the course in JupyterLab.

Gets PostgreSQL and PgBouncer ready first (once, that may take a minute): as programs of this machine, or as
Docker images where CONNLAB_BACKEND=docker or nothing else can be had. Then runs JupyterLab and prints its address.
The address contains a random key: whoever has it can run programs as you. JupyterLab listens on 127.0.0.1 alone;
Ctrl-C ends it, its kernels, and every server that a notebook has started.

A browser opens by itself only where there is a desktop. On a remote machine, forward the port over ssh;
the command to type is printed with the address.
"""
START_EXAMPLES = """\
examples:
  connlab start                 on port 8888, or the next free one
  connlab start --port 9000     on port 9000, or not at all (exit code 4)
  connlab start --no-browser    only print the address
"""
DOCTOR = """\
Look at what the course needs, and say where it was found or how to get it.

Starts no server, and downloads nothing without --fix. A backend is usable when a server could start now with
nothing downloaded; when none is, the exit code is 3. The backend is chosen with CONNLAB_BACKEND (local or docker;
else local where it is usable), and other programs of yours with CONNLAB_POSTGRES (a bin directory) and
CONNLAB_PGBOUNCER (a program).
"""
DOCTOR_EXAMPLES = """\
examples:
  connlab doctor
  connlab doctor --fix          first fetch PgBouncer, download postgres:18, build the images
  connlab doctor --json         {"backends": …, "postgres": …, "pgbouncer": …, "chosen": …}
  CONNLAB_POSTGRES=/usr/lib/postgresql/15/bin connlab doctor
"""
DEMO = """\
Show a leak, a timeout and a saturated server in the terminal, in a few seconds.

Each part prints the code that it runs and the error that this code really got; then PgBouncer serves the
same number of clients that PostgreSQL turned away. If an error that was announced does not come, the demo
says so and fails.
"""
DEMO_EXAMPLES = """\
examples:
  connlab demo
  CONNLAB_POSTGRES=/usr/lib/postgresql/15/bin connlab demo    with another PostgreSQL
"""
CLAIMS = """\
Say how the guide's claims fared in the last runs of the notebooks.

Each notebook measures some of the claims and computes a verdict on each: confirmed, depends, or refuted. A
claim whose notebook has not run here is open. Verdicts are kept in the folder .connlab (CONNLAB_STATE moves
it), one for each claim and backend.
"""
CLAIMS_EXAMPLES = """\
examples:
  connlab claims
  connlab claims --json         [{"id": …, "verdict": …, "evidence": …, "notebook": …, "backend": …, …}, …]
"""
LABS = """\
Derive the labs from their solutions: what the learner is to write becomes a stub.

For authors. Solutions are written by hand, labs never: change the notebook in solutions/, then run this. The notation
is nbgrader's, so a teacher can use the solutions as its sources. A lab that somebody has worked in is not overwritten.
"""
LABS_EXAMPLES = """\
examples:
  connlab labs
  connlab labs --check          change nothing; fail if a lab is not what its solution gives
  connlab labs --force          overwrite labs that somebody has worked in
"""
CLEAN = """\
Remove what servers have left behind whose process is gone, as after a power cut: processes, files, containers.

Usually there is nothing: servers end with the process that started them, and the next one sweeps. Servers
that somebody still uses are left alone. Results of the lessons (the folder .connlab) are kept.
"""
CLEAN_EXAMPLES = """\
examples:
  connlab clean
  connlab clean --cache         also initialised data directories and unpacked programs;
                                the next `connlab start` makes them again
  docker rmi connlab/postgres:18 connlab/pgbouncer
                                the docker backend's images; `connlab doctor --fix` makes them again
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; ``arguments`` None: those of the command line."""
    for stream in (sys.stdout, sys.stderr):
        _never_fail_on_a_character(stream)
    given = parser().parse_args(arguments)
    try:
        code = cast(Callable[[argparse.Namespace], int], given.run)(given)
        sys.stdout.flush()  # here, where it may fail
        return code
    except ConnlabError as problem:
        print(f"connlab {given.command}: {problem}", file=sys.stderr)
        return exit_code(problem)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # as of `connlab doctor | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def exit_code(problem: ConnlabError) -> int:
    """The exit code for an error that ended a command."""
    if isinstance(problem, ProgramMissing):
        return NO_BACKEND
    return cast(int, getattr(problem, "exit_code", FAILED))


def parser() -> argparse.ArgumentParser:
    """The grammar of the command line."""
    top = argparse.ArgumentParser(
        "connlab", description=TOP, epilog=EXIT_CODES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("--version", action=_ShowVersion, nargs=0, help="print connlab's version")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")
    start = _command(commands, "start", _start, "open the course in JupyterLab", START, START_EXAMPLES)
    start.add_argument("--no-browser", action="store_true", help="do not open a browser, only print the address")
    start.add_argument("--port", type=_port, metavar="N", help="listen on this port or fail (8888 or the next free)")
    doctor = _command(commands, "doctor", _doctor, "say what is there and what is missing", DOCTOR, DOCTOR_EXAMPLES)
    doctor.add_argument("--fix", action="store_true", help="first get every backend ready that can be")
    doctor.add_argument("--json", action="store_true", help="print the findings for a program to read")
    _command(commands, "demo", _demo, "a leak, a timeout and saturation in the terminal", DEMO, DEMO_EXAMPLES)
    claims = _command(commands, "claims", _claims, "verdicts on the guide's claims", CLAIMS, CLAIMS_EXAMPLES)
    claims.add_argument("--json", action="store_true", help="print the verdicts for a program to read")
    labs = _command(commands, "labs", _labs, "derive the labs from their solutions", LABS, LABS_EXAMPLES)
    either = labs.add_mutually_exclusive_group()
    either.add_argument("--check", action="store_true", help="change nothing; fail if a lab differs")
    either.add_argument("--force", action="store_true", help="overwrite labs that somebody has worked in")
    clean = _command(commands, "clean", _clean, "remove what dead processes have left", CLEAN, CLEAN_EXAMPLES)
    clean.add_argument("--cache", action="store_true", help="remove the cache too, unless somebody uses it")
    return top


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    description: str,
    epilog: str,
) -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    made = commands.add_parser(name, help=summary, description=description, epilog=epilog, formatter_class=layout)
    made.set_defaults(run=run)
    return made


class _ShowVersion(argparse.Action):
    """Asks the installed package for its version when somebody wants it, not before."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"connlab {version('connlab')}")
        parser.exit()


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 1 << 16:
        raise argparse.ArgumentTypeError(f"{text!r} is no port; write a number from 1 to 65535")
    return int(text)


def _start(given: argparse.Namespace) -> int:
    from connlab import jupyter
    from connlab.prepare import prepare
    from connlab.progress import Progress

    root = jupyter.course_dir()
    if given.port:
        jupyter.check_port(given.port)
    prepare(Progress(sys.stdout))
    jupyter.run(root, port=given.port, browser=not given.no_browser)
    return FINE


def _doctor(given: argparse.Namespace) -> int:
    from connlab import doctor

    if given.fix:
        from connlab.prepare import everything
        from connlab.progress import Progress

        everything(Progress(sys.stderr if given.json else sys.stdout))
    found = doctor.look()
    print(doctor.as_json(found) if given.json else doctor.as_text(found))
    if found.usable:
        return FINE
    print(doctor.ways_out(found), file=sys.stderr)
    return NO_BACKEND


def _demo(_given: argparse.Namespace) -> int:
    from connlab import demo

    demo.run()
    return FINE


def _claims(given: argparse.Namespace) -> int:
    from connlab.lesson import listing, verdicts

    settled, broken = verdicts.load()
    found = verdicts.with_open(settled)
    print(listing.as_json(found) if given.json else listing.as_text(found))
    for line in broken:
        print(f"connlab claims: left out {line}", file=sys.stderr)
    return FINE


def _labs(given: argparse.Namespace) -> int:
    from connlab import labs

    if given.check:
        print(f"{labs.check(labs.root())} labs are what their solutions give")
        return FINE
    for line in labs.write(labs.root(), force=given.force) or ["every lab was up to date"]:
        print(line)
    return FINE


def _clean(given: argparse.Namespace) -> int:
    from connlab import cleaning

    for line in cleaning.sweep():
        print(line)
    if given.cache:
        print(cleaning.remove_cache())
    return FINE


def _never_fail_on_a_character(stream: TextIO) -> None:
    """A terminal that knows no tick mark gets a question mark."""
    reconfigure = getattr(stream, "reconfigure", None)  # not there when a test has put another stream in place
    if reconfigure:
        reconfigure(errors="replace")


if __name__ == "__main__":
    sys.exit(main())
