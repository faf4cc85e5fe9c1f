"""Runs the learner's functions in a process of their own, so that nothing they do can harm the notebook.

The functions, and what they use of the notebook, go there as a pickle made by cloudpickle: of functions that stand in
a notebook it takes the code, of modules the name. A fresh process and not a fork: a forked kernel has its threads'
locks and its sockets, and a pool that was open in the notebook would speak on the same connection from both sides.

This keeps mistakes apart, not malice: the process has the user's rights.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path
from types import CodeType, FunctionType
from typing import IO, Any, Concatenate, Generic, ParamSpec, Self, TypeVar

import cloudpickle  # type: ignore[import-untyped]

from connlab.checks.answers import Place, is_bare_stub, is_learners
from connlab.checks.drivers import Learner
from connlab.checks.errors import CheckError, Ended, Floods, Hangs, Rooted, Unfinished, Unloadable

P = ParamSpec("P")
T = TypeVar("T")

OUTPUT_KEPT = 2000
"""Characters of the learner's output that a card shows."""
OUTPUT_READ = 32_000
"""Bytes of it that are kept to find lines that repeat."""
ADDRESS = re.compile(r"0x[0-9a-f]+")
FLOOD_MB = 5
START_WITHIN = 30.0
"""Seconds that the process has to start and to load the code, before the first call's time begins."""
FRAME = re.compile(r'File "(?P<file>[^"]*)", line (?P<line>\d+) in (?P<function>.+)')


class Sandbox:
    """A process with the learner's functions in it, gone after the ``with`` block and all that it has started.

    Functions of ``connlab.checks.drivers`` (or of a lab's own module) run there, beside the learner's code.

    Example::

        with Sandbox(start=start, handle=handle) as box:
            box.do(5, call, "start", pg.dsn, keep="app")
            answers = box.do(10, load, "handle", [(1,), (2,)], clients=2, on="app")

    Calls raise Unfinished where a function still has its stub, and Trouble for what ends a check.
    """

    def __init__(self, **code: Callable[..., Any]) -> None:
        self._code = packed(code)
        self._stubs = [
            name for name, each in code.items() if isinstance(each, FunctionType) and is_bare_stub(each.__code__)
        ]
        self._ready = False

    def __enter__(self) -> Self:
        self._connection, theirs = Pipe()
        self._last_words = tempfile.TemporaryFile()
        files = (theirs.fileno(), self._last_words.fileno())
        # -u: what was printed before the process is killed is there.
        command = [sys.executable, "-u", "-m", "connlab.checks.worker", *map(str, files), str(os.getpid())]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=files,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                start_new_session=True,
            )
        finally:
            theirs.close()
        assert self._process.stdout is not None
        self._output = Output(self._process.stdout, self._kill)
        with contextlib.suppress(OSError):  # it is gone already; the first call will say so
            self._connection.send_bytes(self._code)
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()
        self._process.wait()
        self._connection.close()
        self._last_words.close()
        self._output.close()

    @property
    def output(self) -> str:
        """The beginning of what the learner's code has printed."""
        return self._output.text()

    def quiet(self) -> None:
        """Keep nothing of what it prints from now on: the check takes things away that its threads still use."""
        self._output.quiet()

    def do(
        self, within: float, driver: Callable[Concatenate[Learner, P], T], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Run ``driver`` there and return what it returns, plain data; at most ``within`` seconds."""
        return self.begin(driver, *args, **kwargs).result(within)

    def begin(self, driver: Callable[Concatenate[Learner, P], T], /, *args: P.args, **kwargs: P.kwargs) -> Pending[T]:
        """Have ``driver`` run there while the check does something else; one at a time."""
        with contextlib.suppress(OSError):
            self._connection.send((driver, args, kwargs))
        return Pending(self)

    def take(self, within: float) -> Any:
        """The next reply; for ``Pending``."""
        try:
            if not self._ready:
                self._receive(START_WITHIN)
                self._ready = True
            return self._receive(within)
        except (EOFError, OSError):
            raise self._end() from None

    def _receive(self, within: float) -> Any:
        if not self._connection.poll(within):
            raise Hangs(within, self._where() if self._ready else None)
        try:
            return _opened(*self._connection.recv())
        except Unfinished as problem:
            raise Unfinished(tuple(dict.fromkeys((*problem.names, *self._stubs))), problem.begun) from None

    def _end(self) -> Ended | Floods:
        """Why it is gone."""
        if self._output.flooded:
            return Floods(FLOOD_MB)
        try:
            code = self._process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            return Ended("it cut the connection to the check")
        if code < 0:
            return Ended(f"its program was killed by {signal.Signals(-code).name}")
        return Ended(f"its program ended with exit status {code}")

    def _where(self) -> Place | None:
        """The learner's line that runs now, in most threads."""
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline:  # threads that run while they are looked at may show nothing: look again
            if places := Counter(_learners_places(self._dump())):
                return places.most_common(1)[0][0]
        return None

    def _dump(self) -> str:
        """faulthandler's text about all threads."""
        begin = os.fstat(self._last_words.fileno()).st_size
        self._process.send_signal(signal.SIGUSR1)
        time.sleep(0.1)
        return os.pread(self._last_words.fileno(), 1 << 20, begin).decode(errors="replace")

    def _kill(self) -> None:
        """End it, and what it has started: they are a session of their own."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)


class Pending(Generic[T]):
    """A driver that runs in a sandbox."""

    def __init__(self, box: Sandbox) -> None:
        self._box = box

    def result(self, within: float) -> T:
        """What it returned; raises Hangs when it takes longer than ``within`` seconds from now."""
        value: T = self._box.take(within)
        return value


class Output:
    """Reads what a process prints: keeps the beginning, counts the rest, and ends a flood."""

    def __init__(self, stream: IO[bytes], kill: Callable[[], None]) -> None:
        self._stream, self._kill = stream, kill
        self._kept, self._size = bytearray(), 0
        self._keeps = True
        self.flooded = False
        self._thread = threading.Thread(target=self._read, name="connlab-output", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while part := os.read(self._stream.fileno(), 1 << 16):
            if not self._keeps:
                continue
            self._kept += part[: OUTPUT_READ - len(self._kept)]
            self._size += len(part)
            if self._size > FLOOD_MB << 20 and not self.flooded:
                self.flooded = True
                self._kill()

    def text(self) -> str:
        """The beginning, each line once, and how much more there was."""
        text = "\n".join(_once(self._kept.decode(errors="replace").strip().splitlines()))
        more = self._size - len(self._kept) + len(text[OUTPUT_KEPT:].encode())
        return f"{text[:OUTPUT_KEPT]}\n… and {more:,} bytes more" if more > 0 else text

    def quiet(self) -> None:
        """Read on, so that nobody waits at a full pipe, and keep nothing more."""
        self._keeps = False

    def close(self) -> None:
        """After the process has been killed. Somebody who left its session may hold the pipe: let the thread go."""
        self._thread.join(2)
        if not self._thread.is_alive():
            self._stream.close()


def _once(lines: list[str]) -> Iterator[str]:
    """Each line where it comes first, with how often it comes; addresses of objects make no difference."""
    times = Counter(ADDRESS.sub("0x…", line) for line in lines)
    first = {ADDRESS.sub("0x…", line): line for line in reversed(lines)}
    for alike in times:
        yield first[alike] + (f" ({times[alike]} times)" if alike and times[alike] > 1 else "")


def _opened(kind: str, value: Any, names: tuple[str, ...]) -> Any:
    if kind == "broken":
        raise CheckError(f"a driver failed in the learner's process:\n{value}")
    if kind == "unloadable":
        raise Unloadable(value)
    if kind == "stub":
        raise Unfinished(names, value)
    if kind == "exit":
        raise Ended(f"`{names[0]}` calls `sys.exit()`")
    return value


def _learners_places(dump: str) -> Iterator[Place]:
    """The learner's innermost line of each thread in faulthandler's text."""
    for thread in dump.split("hread 0x")[1:]:
        frames = [Place(found["function"], int(found["line"]), found["file"]) for found in FRAME.finditer(thread)]
        own = next((at for at, frame in enumerate(frames) if is_learners(frame.file)), None)
        if own is not None:
            yield replace(frames[own], in_pool=any(map(_is_pools_wait, frames[:own])))


def _is_pools_wait(frame: Place) -> bool:
    path = Path(frame.file)
    return (frame.function, path.parent.name) == ("wait", "psycopg_pool") or (
        (frame.function, path.name) == ("get", "queue.py")
    )


# --- taking code along --------------------------------------------------------------------------------------


def packed(code: dict[str, Any]) -> bytes:
    """The functions and all that they use, for another process; raises Rooted where that cannot be."""
    for name, function in code.items():
        if not callable(function):
            raise CheckError(f"{name} is {function!r}; give the function that the learner writes")
    try:
        return _dumped(code)
    except Exception as problem:
        raise _rooted(code, problem) from problem


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Takes cached functions along too: made in C, they would go by their names, which no other process has.

    And the names of the cells that code comes from, which cloudpickle leaves out since 3.1.3: a card shows the line.
    """

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, CodeType):
            make, arguments = self.dispatch_table[CodeType](value)
            return _code_again, (make, arguments, value.co_filename)
        if _is_cached(value) and value.__module__ == "__main__":
            return _cached_again, (value.__wrapped__, value.cache_parameters())
        return super().reducer_override(value)


def _dumped(value: Any) -> bytes:
    with io.BytesIO() as file:
        _Pickler(file).dump(value)
        return file.getvalue()


def _is_cached(value: Any) -> bool:
    return isinstance(value, functools._lru_cache_wrapper)


def _uncached(value: Any) -> Any:
    return value.__wrapped__ if _is_cached(value) else value


def _code_again(make: Callable[..., CodeType], arguments: tuple[Any, ...], file: str) -> CodeType:
    return make(*arguments).replace(co_filename=file)


def _cached_again(function: Callable[..., Any], parameters: dict[str, Any]) -> Any:
    """The function with an empty cache: what is cached here may be a pool of this process."""
    return functools.lru_cache(**parameters)(function)


def _rooted(code: dict[str, Any], problem: Exception) -> Rooted:
    for name, value in _used(code.values(), set()):
        if not _can_travel(value):
            return Rooted(name, f"a {type(value).__name__}")
    return Rooted(next(iter(code)), str(problem))


def _used(values: Any, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """Names and values that functions use from outside, those of the functions that they call first."""
    for function in (each for value in values for each in _functions(value)):
        if id(function) in seen:
            continue
        seen.add(id(function))
        used = {name: function.__globals__[name] for name in _names(function.__code__) & set(function.__globals__)}
        used |= dict(inspect.getclosurevars(function).nonlocals)
        yield from _used(used.values(), seen)
        yield from used.items()


def _functions(value: Any) -> list[FunctionType]:
    if isinstance(value, type) and value.__module__ == "__main__":
        return [each for each in map(_uncached, vars(value).values()) if isinstance(each, FunctionType)]
    value = _uncached(value)
    return [value] if isinstance(value, FunctionType) and value.__module__ == "__main__" else []


def _names(code: CodeType) -> set[str]:
    inner = (each for each in code.co_consts if isinstance(each, CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _can_travel(value: Any) -> bool:
    try:
        _dumped(value)
    except Exception:
        return False
    return True
