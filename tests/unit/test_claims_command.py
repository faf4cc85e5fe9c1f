"""`connlab claims`: for people, for programs, and with files that are broken."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from connlab import cli
from connlab.lesson import verdicts
from connlab.lesson.ledger import ledger
from connlab.lesson.verdicts import Verdict

FIELDS = ["id", "verdict", "evidence", "notebook", "backend", "versions", "at"]
FOUND = Verdict(
    "G22",
    "refuted",
    {"count": 9, "error": "none"},
    "00_start_here",
    "local",
    {"postgres": "18.6"},
    "2026-01-02T03:04:05+00:00",
)


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CONNLAB_STATE", str(tmp_path))
    return tmp_path


def listed(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    assert cli.main(["claims", "--json"]) == cli.FINE
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def test_before_any_run_every_claim_is_open(capsys: pytest.CaptureFixture[str]) -> None:
    found = listed(capsys)
    assert [entry["id"] for entry in found] == list(ledger())
    assert {entry["verdict"] for entry in found} == {"open"}
    assert found[0] == {
        "id": "G01",
        "verdict": "open",
        "evidence": {},
        "notebook": "01_what_a_connection_costs",
        "backend": None,
        "versions": {},
        "at": None,
    }


def test_a_run_fills_its_entry_and_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    verdicts.save(FOUND)
    found = listed(capsys)
    assert [entry["id"] for entry in found] == list(ledger())
    assert all(list(entry) == FIELDS for entry in found)
    (settled,) = [entry for entry in found if entry["verdict"] != "open"]
    assert settled == {
        "id": "G22",
        "verdict": "refuted",
        "evidence": {"count": 9, "error": "none"},
        "notebook": "00_start_here",
        "backend": "local",
        "versions": {"postgres": "18.6"},
        "at": "2026-01-02T03:04:05+00:00",
    }


def test_each_backend_has_an_entry_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    for backend in ("local", "docker"):
        verdicts.save(Verdict(**{**FOUND.__dict__, "backend": backend}))
    entries = [entry for entry in listed(capsys) if entry["id"] == "G22"]
    assert [entry["backend"] for entry in entries] == ["docker", "local"]


def test_for_a_person_it_counts_and_says_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    verdicts.save(FOUND)
    assert cli.main(["claims"]) == cli.FINE
    said = capsys.readouterr().out
    for text in (
        "100 claims: 0 confirmed, 0 depends, 1 refuted, 99 open\n",
        f"G22  refuted    {ledger()['G22'].statement}\n",
        "count = 9, error = none\n",
        "00_start_here, local, postgres 18.6, 2026-01-02T03:04:05+00:00\n",
        "  00_start_here                    G21\n",
    ):
        assert text in said


def test_the_help_explains_and_its_examples_are_valid(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["claims", "--help"])
    assert ended.value.code == 0
    examples = re.findall(r"^  connlab (claims.*?)(?:  |$)", capsys.readouterr().out, re.MULTILINE)
    assert [cli.parser().parse_args(example.split()).json for example in examples] == [False, True]
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "\n    claims " in capsys.readouterr().out


GOOD = json.dumps(FOUND.__dict__)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        ("[]", "not the fields"),
        (json.dumps({"id": "G22"}), "not the fields"),
        (GOOD.replace('"G22"', '"G99"'), "the ledger has no claim 'G99'"),
        (GOOD.replace('"refuted"', '"open"'), "'open' is no verdict"),
        (GOOD.replace('"refuted"', "5"), "verdict is 5"),
        (GOOD.replace('"count": 9', '"count": [9]'), "its evidence 'count' is neither number nor text"),
        ("\ud800", "not JSON"),
    ],
)
def test_a_broken_file_is_named_and_stops_nothing(
    state: Path, text: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    verdicts.save(FOUND)
    broken = state / "verdicts" / "L01.local.json"
    broken.write_bytes(text.encode(errors="surrogatepass"))
    assert cli.main(["claims", "--json"]) == cli.FINE
    output = capsys.readouterr()
    assert [entry["id"] for entry in json.loads(output.out) if entry["verdict"] != "open"] == ["G22"]
    assert str(broken) in output.err
    assert said in output.err
