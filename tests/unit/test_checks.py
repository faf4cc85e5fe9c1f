"""Checks: what a card says, that a check cannot pass by expecting nothing, and what learners' code cannot do to it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from lab_answers import defined

from connlab.checks.answers import Answer, plain, problems
from connlab.checks.drivers import Learner, call, crew, load
from connlab.checks.errors import CheckError, Ended, Floods, Hangs, Rooted, Trouble, Unfinished, Unloadable
from connlab.checks.results import FAILED, OPEN, PASSED, Result, Row
from connlab.checks.sandbox import FLOOD_MB, OUTPUT_KEPT, Sandbox
from connlab.checks.trial import Trial, check

SLACK = 5.0
"""Seconds that a bounded time may be longer, on a busy machine."""


def learners(source: str) -> Any:
    """The function ``act`` that this source defines, as in a notebook."""
    return defined(source)["act"]


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No process, no zombie, no thread, no open file is left of a sandbox."""
    files, before = psutil.Process().num_fds(), psutil.Process().children(recursive=True)
    yield
    assert [child for child in psutil.Process().children(recursive=True) if child not in before] == []
    assert [thread.name for thread in threading.enumerate() if thread.name == "connlab-output"] == []
    assert psutil.Process().num_fds() <= files


# --- in a process of its own --------------------------------------------------------------------------------

NOTEBOOK = """
import math
from decimal import Decimal

FACTOR = 2

class Doubler:
    def apply(self, number):
        return helper(number) * FACTOR

def helper(number):
    return math.floor(number)

def act(number):
    return (Doubler().apply(number), Decimal("1.5"), [None, {"a": b"x"}])
"""


def test_what_the_learners_function_uses_comes_along() -> None:
    with Sandbox(act=learners(NOTEBOOK)) as box:
        answer = box.do(10, call, "act", 21.5)
    assert answer.problem is None
    assert repr(answer.value) == "(42, Decimal('1.5'), [None, {'a': b'x'}])"
    assert answer.arguments == (21.5,) and 0 <= answer.seconds < 10


CACHED: dict[str, tuple[str, Any]] = {
    "a helper": ("@lru_cache\ndef x(number): return Counter().next()\ndef act(): return x(1), x(1)", (1, 1)),
    "the function itself": ("@cache\ndef act(): return Counter().next()", 1),
    "a method": (
        "class A:\n    @lru_cache\n    def x(self): return Counter().next()\n"
        "ONE = A()\ndef act(): return ONE.x(), ONE.x()",
        (1, 1),
    ),
    "one that calls itself": ("@cache\ndef act(n=30): return 1 if n < 2 else act(n - 1) + act(n - 2)", 1346269),
    "a closure": (
        "def make(n):\n    @cache\n    def inner(): return n\n    return inner\nX = make(7)\ndef act(): return X()",
        7,
    ),
    "its size": (
        "@lru_cache(maxsize=3, typed=True)\ndef f(): pass\ndef act(): return f.cache_parameters()",
        {"maxsize": 3, "typed": True},
    ),
    "not what it holds": (
        "@cache\ndef lock(): return threading.Lock()\nlock()\ndef act(): return lock.cache_info().currsize",
        0,
    ),
}
CACHED_HEAD = """
import threading
from functools import cache, lru_cache

class Counter:
    number = 0
    def next(self):
        Counter.number += 1
        return Counter.number

"""


@pytest.mark.parametrize("name", CACHED)
def test_cached_functions_come_along_with_an_empty_cache(name: str) -> None:
    source, value = CACHED[name]
    with Sandbox(act=learners(CACHED_HEAD + source)) as box:
        answer = box.do(10, call, "act")
    assert answer.problem is None
    assert answer.value == value


def test_it_runs_in_another_process_which_is_gone_afterwards() -> None:
    with Sandbox(act=learners("import os\ndef act():\n    return os.getpid(), os.getsid(0)")) as box:
        pid, session = box.do(10, call, "act").value
        assert pid == session != os.getpid()
    assert not psutil.pid_exists(pid)


def test_what_was_kept_is_there_for_the_next_call_and_objects_stay_there() -> None:
    source = "class App:\n    calls = 0\ndef act(app=None):\n    app = app or App()\n    app.calls += 1\n    return app"
    with Sandbox(act=learners(source)) as box:
        assert box.do(10, call, "act", keep="app").value is None
        shown = box.do(10, call, "act", on="app").value
    assert isinstance(shown, str) and "App object" in shown


def test_a_load_comes_from_that_many_threads_and_answers_stay_in_order() -> None:
    source = (
        "import threading, time\ndef act(number):\n    time.sleep(0.05)\n"
        "    if number == 3:\n        raise ValueError('three')\n    return number, threading.get_ident()"
    )
    with Sandbox(act=learners(source)) as box:
        answers = box.do(20, load, "act", [(number,) for number in range(16)], 4)
    assert [answer.arguments for answer in answers] == [(number,) for number in range(16)]
    assert len({answer.value[1] for answer in answers if answer.value}) == 4
    assert [problem.name for problem in problems(answers)] == ["ValueError"]


def test_an_error_says_its_class_bases_message_and_the_learners_line() -> None:
    with Sandbox(act=learners("import json\n\ndef act():\n    return json.loads('{')")) as box:
        problem = box.do(10, call, "act").problem
    assert problem is not None
    assert problem.kinds[:2] == ("JSONDecodeError", "ValueError")
    assert str(problem).startswith("`JSONDecodeError: Expecting property name")
    assert str(problem).endswith("in `act`, line 4: `return json.loads('{')`")


def test_a_crew_keeps_its_threads_and_each_takes_its_turn() -> None:
    source = "import threading\ndef act(app, number): return threading.get_ident()"
    with Sandbox(act=learners(source)) as box:
        box.do(10, call, "act", 1, 1, keep="app")
        rounds = [box.do(10, crew, "act", [(n,) for n in range(6)], 3, "app", in_turn=turn) for turn in (False, True)]
    first, second = ([answer.value for answer in each] for each in rounds)
    assert first == second and len(set(first)) == 3 and first[:3] == first[3:]


@pytest.mark.parametrize("value", [None, True, 3, 2.5, "x", b"x", (1, [2]), {"a": 1}])
def test_plain_data_stays_as_it_is(value: object) -> None:
    assert plain(value) == value


# --- stubs --------------------------------------------------------------------------------------------------


def test_a_stub_is_unfinished_wherever_it_stands() -> None:
    source = "def inner():\n    # YOUR CODE HERE\n    raise NotImplementedError()\ndef act():\n    return inner()"
    with Sandbox(act=learners(source)) as box, pytest.raises(Unfinished) as found:
        box.do(10, load, "act", [()] * 3, 2)
    assert found.value.names == ("inner",)


BARE = "def {}(x):\n    # YOUR CODE HERE\n    raise NotImplementedError()\n"


def test_every_function_that_is_still_a_stub_is_named() -> None:
    code = defined(BARE.format("start") + BARE.format("stop") + "def handle(): pass")
    given = {name: code[name] for name in ("handle", "start", "stop")}
    with Sandbox(**given) as box, pytest.raises(Unfinished) as found:
        box.do(10, call, "start", 1)
    assert (found.value.names, found.value.begun) == (("start", "stop"), ())


def test_a_stub_that_takes_any_number_of_arguments_has_nothing_above_it() -> None:
    act = learners("def act(x, *rest, key=1, **more):\n    raise NotImplementedError()")
    with Sandbox(act=act) as box, pytest.raises(Unfinished) as found:
        box.do(10, call, "act", 1, 2)
    assert (found.value.names, found.value.begun) == (("act",), ())


@pytest.mark.parametrize("above", ["y = x", "print(x)"])
def test_a_stub_that_was_left_below_the_code_is_named(above: str, capsys: pytest.CaptureFixture[str]) -> None:
    act = learners(f"def act(x):\n    {above}\n    raise NotImplementedError()")

    def body(_: Trial) -> None:
        with Sandbox(act=act) as box:
            box.do(10, call, "act", 1)

    assert a_check(body)().status == OPEN
    assert "In act the stub's last line still stands below your code" in capsys.readouterr().out


@pytest.mark.parametrize(
    "source",
    [
        "def act():\n    raise NotImplementedError('no such mode')",
        "import asyncio\ndef act():\n    asyncio.AbstractEventLoop().run_forever()",
        "class NotImplementedErrorToo(NotImplementedError): pass\ndef act():\n    raise NotImplementedErrorToo()",
    ],
    ids=["with a message", "a library's", "another class"],
)
def test_only_the_stub_itself_counts_as_unfinished(source: str) -> None:
    with Sandbox(act=learners(source)) as box:
        answer = box.do(10, call, "act")
    assert answer.problem is not None and not answer.problem.is_stub


# --- what must not harm -------------------------------------------------------------------------------------

HARM: dict[str, tuple[str, type[Trouble], str]] = {
    "hangs": (
        "import time\ndef act():\n    time.sleep(600)",
        Hangs,
        "none; your code was in `act`, line 3: `time.sleep",
    ),
    "spins": ("def act():\n    while True:\n        pass", Hangs, "your code was in `act`, line"),
    "spins in C": ("def act():\n    return sum(iter(int, 1))", Hangs, "`act`, line 2: `return sum(iter(int, 1))`"),
    "hangs in a thread": (
        "import threading\ndef wait(event):\n    event.wait()\ndef act():\n"
        "    t = threading.Thread(target=wait, args=[threading.Event()]); t.start(); t.join()",
        Hangs,
        "your code was in `",
    ),
    "sys.exit": ("import sys\ndef act():\n    sys.exit('bye')", Ended, "`act` calls `sys.exit()`"),
    "os._exit": ("import os\ndef act():\n    os._exit(3)", Ended, "its program ended with exit status 3"),
    "crashes": ("import ctypes\ndef act():\n    ctypes.string_at(0)", Ended, "killed by SIGSEGV"),
    "kills itself": ("import os, signal\ndef act():\n    os.kill(0, 9)", Ended, "killed by SIGKILL"),
    "floods": ("def act():\n    while True:\n        print('x' * 1000)", Floods, f"more than {FLOOD_MB} MB"),
    "floods a file descriptor": (
        "import os\ndef act():\n    while True:\n        os.write(2, b'y' * 999)",
        Floods,
        "MB",
    ),
    "cuts the connection": (
        "import os, time\ndef act():\n    os.closerange(3, 99)\n    time.sleep(60)",
        Ended,
        "it cut",
    ),
}


@pytest.mark.parametrize("name", HARM)
def test_harmful_code_gets_a_message_within_its_time_and_the_next_runs(name: str) -> None:
    source, kind, said = HARM[name]
    begin = time.monotonic()
    with Sandbox(act=learners(source)) as box, pytest.raises(kind) as found:
        box.do(2, call, "act")
    assert time.monotonic() - begin < 2 + SLACK
    assert said in found.value.measured and found.value.look
    assert len(box.output) < OUTPUT_KEPT + 100
    with Sandbox(act=learners("def act(): return 1")) as box:
        assert box.do(10, call, "act").value == 1


def test_what_it_has_started_is_gone_too() -> None:
    source = "import subprocess\ndef act():\n    return subprocess.Popen(['sleep', '600']).pid"
    with Sandbox(act=learners(source)) as box:
        pid = box.do(10, call, "act").value
        assert psutil.pid_exists(pid)
    deadline = time.monotonic() + SLACK
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" and time.monotonic() < deadline:
        time.sleep(0.02)  # whoever adopts it collects it, in its own time
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie"


@pytest.fixture
def silent_terminal() -> Iterator[None]:
    """A standard input on which nothing ever comes."""
    saved, ends = os.dup(0), os.pipe()
    os.dup2(ends[0], 0)
    yield
    os.dup2(saved, 0)
    for descriptor in (saved, *ends):
        os.close(descriptor)


def test_input_does_not_wait_for_anybody(silent_terminal: None) -> None:
    with Sandbox(act=learners("def act():\n    return input()")) as box:
        answer = box.do(2, call, "act")
    assert answer.problem is not None and answer.problem.name == "EOFError"


def test_what_it_prints_is_kept_up_to_a_length() -> None:
    source = "def act():\n    print('hello')\n    print('x' * 9000, flush=True)"
    with Sandbox(act=learners(source)) as box:
        box.do(10, call, "act")
    assert box.output.startswith("hello\nxxx")
    assert "bytes more" in box.output and len(box.output) < OUTPUT_KEPT + 100


def test_lines_that_repeat_are_shown_once_and_a_library_is_named_as_their_source() -> None:
    source = (
        "import logging\ndef act(number):\n"
        "    logging.getLogger('psycopg.pool').warning('rolling back <Connection at 0x%x>', number)\n    print('hello')"
    )
    with Sandbox(act=learners(source)) as box:
        for number in range(10, 34):
            box.do(10, call, "act", number)
        box.do(10, call, "act", 10)
    assert "log of psycopg.pool: rolling back <Connection at 0xa> (25 times)" in box.output.splitlines()
    assert len(box.output.splitlines()) == 2


def test_an_interrupt_of_the_check_leaves_nothing() -> None:
    begin, main = time.monotonic(), threading.main_thread().ident
    threading.Timer(0.5, signal.pthread_kill, [main, signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt), Sandbox(act=learners("import time\ndef act(): time.sleep(600)")) as box:
        box.do(60, call, "act")
    assert time.monotonic() - begin < SLACK


ORPHAN = """
import sys
from lab_answers import defined
from connlab.checks.drivers import call
from connlab.checks.sandbox import Sandbox
with Sandbox(act=defined("def act():\\n    while True: pass")["act"]) as box:
    box.begin(call, "act")
    print(box._process.pid, flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere an endless loop outlives a killed kernel")
def test_it_ends_when_the_kernel_is_killed() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "notebooks")}
    with subprocess.Popen(
        [sys.executable, "-c", ORPHAN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as kernel:
        assert kernel.stdout is not None
        child = psutil.Process(int(kernel.stdout.readline()))
        time.sleep(1)
        kernel.kill()
    deadline = time.monotonic() + SLACK
    while child.is_running() and child.status() != "zombie" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not child.is_running() or child.status() == "zombie"


@pytest.mark.parametrize(
    ("source", "named"),
    [
        (
            "import threading\nLOCK = threading.Lock()\ndef act():\n    with LOCK: pass",
            "`LOCK` of the notebook (a lock)",
        ),
        ("import threading\nLOCK = threading.Lock()\ndef inner(): LOCK\ndef act(): inner()", "`LOCK` of the notebook"),
        ("import threading\nL = threading.Lock()\nclass A:\n    def x(self): L\ndef act(): A()", "`L` of the notebook"),
        (
            "import threading\ndef make():\n    lock = threading.Lock()\n    return lambda: lock\nact = make()",
            "`lock` of",
        ),
        (
            "import threading\nfrom functools import cache\nL = threading.Lock()\n@cache\ndef inner(): L\n"
            "def act(): inner()",
            "`L` of the notebook",
        ),
    ],
    ids=["global", "of a helper", "of a class", "closure", "of a cached helper"],
)
def test_what_cannot_leave_the_notebook_is_named(source: str, named: str) -> None:
    with pytest.raises(Rooted) as found:
        Sandbox(act=learners(source))
    assert named in found.value.measured


def test_a_module_that_only_the_notebook_has_is_a_message() -> None:
    source = "import sys, types\nsys.modules['mine_alone'] = types.ModuleType('mine_alone')\nimport mine_alone\n"
    module = defined(source + "mine_alone.__spec__ = object()\ndef act(): return mine_alone")
    sys.modules["mine_alone"].answer = module["act"]  # type: ignore[attr-defined]
    module["act"].__module__ = "mine_alone"
    module["act"].__qualname__ = "answer"
    with Sandbox(act=module["act"]) as box, pytest.raises(Unloadable) as found:
        box.do(10, call, "act")
    assert "mine_alone" in found.value.measured


def test_a_driver_that_fails_is_the_checks_mistake() -> None:
    with Sandbox(act=learners("def act(): pass")) as box, pytest.raises(CheckError, match="KeyError: 'other'"):
        box.do(10, _other)


def _other(learner: Learner) -> Answer:
    raise KeyError("other")


# --- a check ------------------------------------------------------------------------------------------------


def a_check(body: Callable[[Trial], None]) -> Callable[[], Result]:
    @check("It works")
    def made(trial: Trial) -> None:
        """Write `act`."""
        body(trial)

    return made


def test_a_check_passes_when_all_is_met(capsys: pytest.CaptureFixture[str]) -> None:
    result = a_check(lambda trial: trial.expect("`1`", "1", True, "x"))()
    assert result == Result("It works", PASSED, (Row("`1`", "1", True),))
    assert result.passed
    assert capsys.readouterr().out == "✓ Passed: It works\n  ✓ expected: 1\n    measured: 1\n"


def test_the_first_expectation_that_is_not_met_ends_it(capsys: pytest.CaptureFixture[str]) -> None:
    def body(trial: Trial) -> None:
        trial.expect("one", "1", True, "here")
        trial.expect("two", "3", False, "there")
        trial.expect("three", "3", True, "nowhere")

    result = a_check(body)()
    assert (result.status, result.passed, len(result.rows), result.look) == (FAILED, False, 2, "there")
    said = capsys.readouterr().out
    assert said.startswith("✗ Not passed: It works\n") and said.endswith("Where to look next: there\n")


def test_trouble_fails_the_check_and_a_stub_leaves_it_open(capsys: pytest.CaptureFixture[str]) -> None:
    def trouble(_: Trial) -> None:
        raise Hangs(2, None)

    def stub(_: Trial) -> None:
        raise Unfinished(("act",))

    result = a_check(trouble)()
    assert result.status == FAILED and result.rows[0].expected == "an answer within 2 s" and result.look
    result = a_check(stub)()
    assert (result.status, result.passed) == (OPEN, False)
    assert capsys.readouterr().out.endswith(
        "○ Not solved yet: It works\n  Asked: Write act. Still to be written: act.\n"
    )


def test_a_check_that_expects_nothing_is_refused() -> None:
    with pytest.raises(CheckError, match="expected nothing"):
        a_check(lambda trial: None)()


@pytest.mark.parametrize(
    "given", [("", "1", True, "x"), ("1", " ", True, "x"), ("1", "1", True, ""), ("1", "1", 1, "x")]
)
def test_an_expectation_that_says_nothing_is_refused(given: Any) -> None:
    with pytest.raises(CheckError, match="three texts and, third, True or False"):
        a_check(lambda trial: trial.expect(*given))()


def test_a_check_that_does_not_say_what_is_asked_is_refused() -> None:
    with pytest.raises(CheckError, match="does not say what is asked"):
        check("It works")(lambda trial: None)


def test_a_mistake_of_the_check_is_not_blamed_on_the_learner() -> None:
    with pytest.raises(ZeroDivisionError):
        a_check(lambda trial: trial.expect("1", f"{1 / 0}", True, "x"))()


def test_the_card_shows_code_as_code_and_lets_no_markup_through() -> None:
    result = Result("`act` & more", FAILED, (Row("`1 < 2`", "<b>", False),), "Look at `act`.", "<script>x</script>")
    markup = result._markup()
    assert "<code>act</code> &amp; more" in markup and "<code>1 &lt; 2</code>" in markup
    assert "<b>" not in markup and "<script>" not in markup
    assert ">✗</span>" in markup and "What your code printed" in markup
