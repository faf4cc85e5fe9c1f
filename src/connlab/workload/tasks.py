"""Runs a plan with an asyncio task for each client."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

from connlab.workload.alarm import Alarm
from connlab.workload.load import Load
from connlab.workload.plan import Plan
from connlab.workload.progress import Bar
from connlab.workload.request import Request
from connlab.workload.run import Run, Stopped, at_deadline, interrupted

Work = Callable[..., Awaitable[object]]
Borrow = Callable[[], AbstractAsyncContextManager[Any] | Awaitable[AbstractAsyncContextManager[Any]]]
LOOK = 0.1
TURN = 0.01
"""Seconds after which a client lets others run: work that never waits would keep the loop for itself."""
PATIENCE = 6.0
"""Seconds for cancelled tasks: psycopg asks the server to cancel first, and waits 5 s for its answer."""


async def run(plan: Plan, work: Work, borrow: Borrow | None, deadline: float) -> Load:
    """Run ``plan`` to its end, or to ``deadline`` seconds after its start."""
    with Alarm() as alarm:
        crew = Crew(plan, work, borrow, alarm)
        try:
            crew.start()
            await crew.wait(deadline)
        except BaseException as problem:  # the cell was interrupted, or our own task cancelled
            load = crew.load("was interrupted")
            load.left = await crew.stop()
            interrupted(problem, load)
            raise
        load = crew.load(at_deadline(deadline))
        load.left = await crew.stop()
        return load


class Crew(Run):
    """The tasks of a run."""

    def __init__(self, plan: Plan, work: Work, borrow: Borrow | None, alarm: Alarm) -> None:
        super().__init__(plan)
        self._work, self._borrow, self._alarm, self._stopping = work, borrow, alarm, False
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Start the clock and all tasks."""
        self.set_off()
        self._tasks = [asyncio.create_task(self._client(number)) for number in range(self.plan.clients)]

    async def wait(self, deadline: float) -> None:
        """Return when every task has ended, and at the deadline."""
        with Bar(self.plan.kind) as bar:
            pending = set(self._tasks)
            while pending and (left := deadline - self.now()) > 0:
                _, pending = await asyncio.wait(pending, timeout=min(left, LOOK))
                bar.show(self.plan.share(self.now(), self.ended()), self.ended())

    async def stop(self) -> int:
        """Cancel what runs; returns how many tasks live on."""
        self._stopping = True
        alive = {task for task in self._tasks if not task.done()}
        for task in alive:
            task.cancel()
        if alive:
            await asyncio.wait(alive, timeout=PATIENCE)
        return sum(not task.done() for task in self._tasks)

    async def _client(self, number: int) -> None:
        own, ended, yielded = self.requests[number], None, 0.0
        while (moment := self.plan.next(number, ended)) is not None:
            request = Request(number, moment, borrows=self._borrow is not None)
            own.append(request)
            await self._alarm.at(self.began + moment)
            await self._make(request)
            ended = request.ended
            if ended - yielded > TURN:
                await asyncio.sleep(0)
                yielded = ended

    async def _make(self, request: Request) -> None:
        self.started(request)
        try:
            if self._borrow is None:
                await _awaited(self._work())
            else:
                async with await _opened(self._borrow()) as connection:
                    request.borrowed = self.now()
                    if self._stopping:
                        raise Stopped
                    await _awaited(self._work(connection))
        except (Exception, SystemExit, asyncio.CancelledError) as problem:
            if self._stopping or _is_cancelled():
                raise
            request.failed(problem)
        request.ended = self.now()


def _is_cancelled() -> bool:
    """Whether it is we who are cancelled, and not something that ``work`` waited for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def _opened(borrowed: Any) -> AbstractAsyncContextManager[Any]:
    """``AsyncConnection.connect()`` gives its connection only to who awaits it."""
    opened: AbstractAsyncContextManager[Any]
    opened = borrowed if hasattr(borrowed, "__aenter__") else await borrowed
    return opened


async def _awaited(result: object) -> None:
    if not inspect.isawaitable(result):
        raise TypeError("work returned nothing to await: write it with async def, or call closed_loop(…), open_loop(…)")
    await result
