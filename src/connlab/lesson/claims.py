"""Verdicts on the guide's claims, computed from what a notebook has just measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from connlab.lesson import ledger, rules, started, verdicts
from connlab.lesson.errors import LessonError, VerdictError
from connlab.lesson.rules import Measurement, Rule
from connlab.lesson.verdict_card import VerdictCard, listed
from connlab.lesson.verdicts import CONFIRMED, DEPENDS, REFUTED, Verdict


class Claim:
    """One claim of the guide, ready to be judged; ``claim("G01")`` makes it."""

    def __init__(self, entry: ledger.Entry) -> None:
        self.entry = entry

    def judge(
        self,
        measured: Mapping[str, Measurement],
        *,
        confirmed: Rule,
        refuted: Rule,
        otherwise: str,
        counterexample: Mapping[str, Measurement] | Sequence[Mapping[str, Measurement]],
        instead: str = "",
        on: started.Server | Sequence[started.Server] | None = None,
    ) -> None:
        """Compute the verdict, show it with the numbers and rules that it comes from, and keep it for `connlab claims`.

        The rules get ``measured`` as attributes. Neither is true: the verdict is *depends*, and ``otherwise`` says on
        what. ``counterexample`` replaces some of the measurements by what they would be if it were otherwise, to show
        that the rules can tell; of several, one must get another verdict. ``instead`` says what is true when the claim
        is refuted. ``on``: the servers measured, if not all that this process has started.

        Raises LessonError for what is wrong with the call, VerdictError when the rules contradict each other or do
        not tell the counterexample from the measurement.

        Example::

            claim("G01").judge(
                {"connect_ms": 5.2},
                confirmed=lambda m: 10 <= m.connect_ms <= 100,
                refuted=lambda m: m.connect_ms < 0.1,
                otherwise="depends on authentication, TLS and round trip",
                counterexample={"connect_ms": 40},
            )
        """
        if not isinstance(otherwise, str) or not otherwise.strip():
            raise LessonError(f"claim {self.entry.id}: otherwise is {otherwise!r}; say on what it depends")
        values = rules.checked(measured, f"claim {self.entry.id}, measured")
        outcome = rules.verdict(values, confirmed, refuted)
        other = self._other_outcome(values, counterexample, confirmed, refuted, outcome)
        where = started.environment(on)
        saved = self._saved(outcome, values, where)
        told = {DEPENDS: otherwise.removeprefix("depends "), REFUTED: instead and f"- {instead}"}.get(outcome, "")
        meanings = {CONFIRMED: rules.meaning(confirmed), REFUTED: rules.meaning(refuted)}
        VerdictCard(self.entry, saved, told, meanings, other, where).show()

    def _other_outcome(
        self,
        values: Mapping[str, Measurement],
        counterexample: Mapping[str, Measurement] | Sequence[Mapping[str, Measurement]],
        confirmed: Rule,
        refuted: Rule,
        outcome: str,
    ) -> str:
        """A sentence on the counterexample that gets another verdict; raises VerdictError when none does."""
        several = [counterexample] if isinstance(counterexample, Mapping) else list(counterexample)
        for example in several:
            changed = self._changed(values, example)
            other = rules.verdict({**values, **changed}, confirmed, refuted)
            if other != outcome:
                return f"With {listed(changed)} the verdict would be: {other}"
        raise VerdictError(
            f"claim {self.entry.id}: the verdict is {outcome!r} for what was measured ({listed(values)}) and for the "
            f"counterexample ({' or '.join(map(str, several)) or 'there is none'}) alike, so the rules show nothing; "
            "change a rule, or give a list of counterexamples of which one gets another verdict"
        )

    def _changed(self, values: Mapping[str, Measurement], example: object) -> dict[str, Measurement]:
        changed = rules.checked(example, f"claim {self.entry.id}, counterexample")
        unknown = [name for name in changed if name not in values]
        if unknown:
            raise LessonError(
                f"claim {self.entry.id}, counterexample: {unknown[0]} was not measured, only {', '.join(values)}"
            )
        return changed

    def _saved(self, outcome: str, values: dict[str, Measurement], where: started.Environment) -> Verdict:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        verdict = Verdict(self.entry.id, outcome, values, self.entry.notebook, where.backend, where.versions, now)
        verdicts.save(verdict)
        return verdict


def claim(name: str) -> Claim:
    """The claim with the id ``name``, such as "G01"; raises LessonError when the ledger has none."""
    return Claim(ledger.find(name))
