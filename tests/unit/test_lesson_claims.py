"""Verdicts: what the rules may say, what is refused, what is shown, and what is kept."""

from __future__ import annotations

import json
import linecache
import re
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

import connlab
from connlab import claim
from connlab.lesson import rules, started, verdicts
from connlab.lesson.errors import LessonError, VerdictError
from connlab.lesson.ledger import ledger
from connlab.version import Version

Rule = Callable[[Any], bool]


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state directory of our own, and a process that has started nothing."""
    monkeypatch.setenv("CONNLAB_STATE", str(tmp_path))
    monkeypatch.setattr(started, "_seen", {})
    return tmp_path


class Postgres:
    def __init__(self, version: str = "18.6") -> None:
        self.version = Version.find(version)


def judge(measured: object = None, **changes: Any) -> None:
    """The design's example, with some arguments replaced."""
    given: dict[str, Any] = {
        "confirmed": lambda m: 10 <= m.connect_ms <= 100,
        "refuted": lambda m: m.connect_ms < 0.1,
        "otherwise": "depends on authentication, TLS and round trip",
        "counterexample": {"connect_ms": 40},
    }
    claim("G01").judge({"connect_ms": 5.2} if measured is None else measured, **{**given, **changes})  # type: ignore[arg-type]


def kept(state: Path) -> dict[str, Any]:
    (file,) = (state / "verdicts").iterdir()
    found: dict[str, Any] = json.loads(file.read_text())
    return found


# --- the ledger ---------------------------------------------------------------------------------------------


def test_the_ledger_has_the_guides_hundred_claims() -> None:
    counts = {"G": 22, "A": 13, "B": 25, "S": 15, "L": 25}
    numbered = [f"{letter}{number:02}" for letter, count in counts.items() for number in range(1, count + 1)]
    assert list(ledger()) == numbered


def test_each_claim_is_a_sentence_of_a_section_with_a_notebook() -> None:
    sections = {"G": "20.2", "A": "20.2.1", "B": "20.2.2", "S": "20.2.3", "L": "20.2.4"}
    for entry in ledger().values():
        assert entry.section == sections[entry.id[0]]
        assert re.fullmatch(r"\d\d_[a-z_]+", entry.notebook)
        assert re.fullmatch(r"[A-Z`p].{20,}[.]", entry.statement), entry
    statements = [entry.statement for entry in ledger().values()]
    assert len(set(statements)) == len(statements)


@pytest.mark.parametrize(("name", "meant"), [("G1", "did you mean G01"), ("g04", "did you mean G04"), ("?", "ids are")])
def test_a_claim_that_is_not_there_is_refused_with_its_neighbours(name: str, meant: str) -> None:
    with pytest.raises(LessonError, match=meant):
        claim(name)


# --- the verdict --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ms", "counterexample", "verdict"), [(50, 5, "confirmed"), (5.2, 40, "depends"), (0.05, 40, "refuted")]
)
def test_the_verdict_comes_from_the_measurement(state: Path, ms: float, counterexample: float, verdict: str) -> None:
    judge({"connect_ms": ms}, counterexample={"connect_ms": counterexample})
    assert kept(state)["verdict"] == verdict
    assert kept(state)["evidence"] == {"connect_ms": ms}


def test_a_counterexample_that_gets_the_same_verdict_is_refused(state: Path) -> None:
    with pytest.raises(VerdictError, match=r"G01: the verdict is 'depends' .*connect_ms = 5.2.*rules show nothing"):
        judge(counterexample={"connect_ms": 7})
    assert not (state / "verdicts").exists()


def test_of_several_counterexamples_one_must_get_another_verdict() -> None:
    for measured in (5.2, 40):
        judge({"connect_ms": measured}, counterexample=[{"connect_ms": 40}, {"connect_ms": 5}])
    with pytest.raises(VerdictError):
        judge(counterexample=[{"connect_ms": 4}, {"connect_ms": 5}])
    with pytest.raises(VerdictError):
        judge(counterexample=[])


def test_a_counterexample_replaces_only_what_it_names(state: Path) -> None:
    rule: Rule = lambda m: m.pids == m.connections  # noqa: E731
    judge({"pids": 5, "connections": 5}, confirmed=rule, refuted=lambda m: not rule(m), counterexample={"pids": 1})
    assert kept(state)["verdict"] == "confirmed"


def test_rules_that_are_both_true_are_refused() -> None:
    with pytest.raises(VerdictError, match=r"contradict each other.*connect_ms = 5.2"):
        judge(confirmed=lambda m: m.connect_ms > 1, refuted=lambda m: m.connect_ms > 2)
    with pytest.raises(VerdictError, match="contradict each other"):
        judge(confirmed=lambda m: m.connect_ms > 1, refuted=lambda m: m.connect_ms > 30)  # by the counterexample


@pytest.mark.parametrize(
    ("measured", "said"),
    [
        ({}, "at least one measurement"),
        ([5.2], "at least one measurement"),
        ({"connect_ms": float("nan")}, "connect_ms is nan"),
        ({"connect_ms": float("inf")}, "connect_ms is inf"),
        ({"connect_ms": None}, "connect_ms is None"),
        ({"connect_ms": True}, "connect_ms is True.*Instead of true or false"),
        ({"connect_ms": [1, 2]}, r"connect_ms is \[1, 2\]"),
        ({"connect_ms": " "}, "connect_ms is ' '"),
        ({"connect ms": 5.2}, "'connect ms' is no name"),
        ({1: 5.2}, "1 is no name"),
    ],
)
def test_what_is_no_measurement_is_refused(measured: object, said: str) -> None:
    with pytest.raises(LessonError, match=said):
        judge(measured)


def test_numbers_of_databases_and_texts_are_measurements(state: Path) -> None:
    judge({"connect_ms": Decimal("5.20"), "error": "PoolTimeout", "n": 3})
    assert kept(state)["evidence"] == {"connect_ms": 5.2, "error": "PoolTimeout", "n": 3}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"confirmed": lambda m: m.conect_ms > 1},
            r"'confirmed'.*'conect_ms' was not measured.*did you mean connect_ms",
        ),
        ({"refuted": lambda m: m.connect_ms / 0 > 1}, "the rule 'refuted' failed with ZeroDivisionError"),
        ({"refuted": lambda m: m.connect_ms}, "the rule 'refuted' gave 5.2, which is neither True nor False"),
        ({"confirmed": "connect_ms > 1"}, "the rule 'confirmed' is 'connect_ms > 1'; write a function"),
        ({"counterexample": {"conect_ms": 40}}, "counterexample: conect_ms was not measured, only connect_ms"),
        ({"counterexample": {}}, "counterexample must be a dict with at least one"),
        ({"counterexample": [40]}, "counterexample must be a dict with at least one"),
        ({"otherwise": " "}, "say on what it depends"),
    ],
)
def test_what_is_wrong_about_a_call_is_named(state: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(LessonError, match=said):
        judge(**changes)
    assert not (state / "verdicts").exists()


# --- what is shown ------------------------------------------------------------------------------------------


def test_the_card_says_claim_verdict_numbers_rules_and_servers(capsys: pytest.CaptureFixture[str]) -> None:
    started.remember(Postgres(), "local")
    judge()
    said = capsys.readouterr().out
    for text in (
        "Claim G01 (guide, section 20.2): Opening a connection to PostgreSQL takes between 10 and 100 ms.",
        "depends on authentication, TLS and round trip",
        "Measured here: connect_ms = 5.2",
        "It would be confirmed if: 10 <= connect_ms <= 100",
        "It would be refuted if: connect_ms < 0.1",
        "With connect_ms = 40 the verdict would be: confirmed",
        "PostgreSQL 18.6, psycopg 3.",
        "(local backend)",
    ):
        assert text in said


def test_a_refuted_claim_says_what_is_true_instead(capsys: pytest.CaptureFixture[str]) -> None:
    judge({"connect_ms": 0.01}, instead="it is much faster")
    assert "refuted - it is much faster" in capsys.readouterr().out


def named(m: Any) -> bool:
    """More than one connection was left.

    Further lines are for readers of the code.
    """
    return bool(m.left > 1)


CELL = """\
pair = (lambda m: m.é > "ü", lambda m: m.b < 2 and
        m.a != 1), lambda x: not x.leaked
above = (lambda limit: lambda m: m.x > limit)(3)
"""


def test_a_rule_is_told_as_it_stands_in_the_notebook() -> None:
    linecache.cache["cell"] = (len(CELL), None, CELL.splitlines(keepends=True), "cell")
    space: dict[str, Any] = {}
    exec(compile(CELL, "cell", "exec"), space)
    (first, second), third = space["pair"]
    assert [rules.meaning(rule) for rule in (first, second, third, space["above"])] == [
        "é > 'ü'",
        "b < 2 and a != 1",
        "not leaked",
        "x > limit",
    ]
    assert rules.meaning(named) == "More than one connection was left."


def test_a_rule_without_source_is_told_as_such() -> None:
    assert "cell above" in rules.meaning(eval("lambda m: m.x > 1"))


# --- the environment ----------------------------------------------------------------------------------------


def test_the_servers_that_this_process_started_are_what_was_measured(state: Path) -> None:
    for version, backend in (("18.6", "docker"), ("15.4", "docker"), ("18.6", "docker")):
        started.remember(Postgres(version), backend)
    judge()
    assert kept(state)["backend"] == "docker"
    assert kept(state)["versions"]["postgres"] == "15.4, 18.6"
    assert set(kept(state)["versions"]) == {"postgres", "psycopg", "psycopg_pool"}


def test_a_real_server_is_named_with_its_version(state: Path) -> None:
    with connlab.Postgres.start(backend="local") as pg:
        started.remember(pg, "local")
        judge(on=[pg, pg.pgbouncer()])
        judge_versions = kept(state)["versions"]
        assert judge_versions["postgres"] == pg.value("show server_version").split()[0]
    assert re.fullmatch(r"1\.\d+\.\d+", judge_versions["pgbouncer"])
    assert kept(state)["backend"] == "local"


def test_servers_that_were_named_are_the_only_ones(state: Path) -> None:
    old, new = Postgres("15.4"), Postgres("18.6")
    started.remember(old, "local")
    started.remember(new, "docker")
    judge(on=old)
    assert (kept(state)["backend"], kept(state)["versions"]["postgres"]) == ("local", "15.4")
    judge(on=[old, Postgres("16.1")])
    assert (kept(state)["backend"], kept(state)["versions"]["postgres"]) == ("local", "15.4, 16.1")


# --- what is kept -------------------------------------------------------------------------------------------


def test_there_is_one_file_for_each_claim_and_backend(state: Path) -> None:
    one, other = Postgres(), Postgres()
    started.remember(one, "local")
    started.remember(other, "docker")
    for server in (one, other, one):
        judge(on=server)
    assert sorted(file.name for file in (state / "verdicts").iterdir()) == ["G01.docker.json", "G01.local.json"]


def test_a_verdict_is_replaced_in_one_step(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge()
    before = kept(state)

    def interrupted(_source: object, _target: object) -> None:
        assert kept_files(state) == ["G01.none.json"]
        raise KeyboardInterrupt

    monkeypatch.setattr(verdicts.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        judge({"connect_ms": 50}, counterexample={"connect_ms": 5})
    assert kept(state) == before


def kept_files(state: Path) -> list[str]:
    return [file.name for file in (state / "verdicts").glob("[!.]*")]


@pytest.fixture
def read_only(state: Path) -> Iterator[Path]:
    (state / "verdicts").write_text("no folder")
    yield state


def test_a_state_directory_that_takes_no_file_is_named(read_only: Path) -> None:
    with pytest.raises(Exception, match="verdicts"):
        judge()
