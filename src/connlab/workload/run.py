"""What a run with threads and one with tasks have in common: the clock, the requests, the end."""

from __future__ import annotations

import copy
import itertools
import math
import time
from typing import Any

from connlab.workload.load import Load
from connlab.workload.plan import Plan
from connlab.workload.request import Request

GRACE = 0.5
"""Seconds that clients get to end by themselves once they are told to."""
LEAD = 0.005
PER_CLIENT = 0.0001
"""Seconds before the first start: each client is ready by then, and none begins while others are still made."""


class Stopped(Exception):
    """Raised in a client that got its connection after the end: its request is not made any more."""


class Run:
    """A run of ``plan``: who is under way, and what became of it."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.began = time.monotonic()
        self.requests: list[list[Request]] = [[] for _ in range(plan.clients)]

    def set_off(self) -> None:
        """The clock's 0 is in a moment."""
        self.began = time.monotonic() + LEAD + PER_CLIENT * self.plan.clients

    def now(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.began

    def ended(self) -> int:
        """How many requests have ended so far, about."""
        return sum(len(requests) for requests in self.requests)

    def started(self, request: Request) -> None:
        """Note the start of ``request``, now."""
        request.started = self.now()
        if not self.plan.is_open:
            request.intended = request.started

    def load(self, why: str) -> Load:
        """What is known at this moment; for requests that have not ended, ``why`` they were given up.

        Copies: a client that cannot be stopped goes on writing to its own.
        """
        at = max(self.now(), 0.0)
        requests = [copy.copy(request) for request in itertools.chain(*self.requests)]
        requests = [request for request in requests if not math.isnan(request.ended) or request.intended < at]
        requests += [Request(-1, moment) for moment in self.plan.missed(at)]
        for request in requests:
            if math.isnan(request.ended):
                request.given_up(at, why)
        return Load(
            self.plan.kind, requests, clients=self.plan.clients, began=self.began, seconds=min(self.plan.seconds, at)
        )


def interrupted(problem: BaseException, load: Load) -> None:
    """Hang what was measured on the exception that ended it."""
    kept: Any = problem
    kept.load = load
    problem.add_note(f"{len(load):,} requests were made until then; this exception has them as .load")


def at_deadline(deadline: float) -> str:
    """Why a request was given up."""
    return f"had not ended {deadline:g} s after the start, which is the deadline"
