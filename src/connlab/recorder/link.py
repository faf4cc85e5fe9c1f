"""One connection to a server that is never waited for: asked, looked at when its socket is ready, given up.

A frozen or mute server costs the thread that samples nothing, since nothing here blocks.
"""

from __future__ import annotations

import select
from collections.abc import Callable, Mapping

from psycopg import Error, pq

from connlab.recorder.servers import ServerSource

GAP = 0.5
"""Seconds after which an answer counts as none: nobody could say which moment it tells of."""
PATIENCE = 2.0
"""Seconds after which a connection that says nothing is given up for a new one."""
RETRY = 0.1
"""Seconds between attempts to connect to a server that refuses."""
GOOD = (pq.ExecStatus.TUPLES_OK, pq.ExecStatus.COMMAND_OK)


class Link:
    """Asks ``source`` once a tick and hands on its answer, or that there is none and why.

    ``answered(seconds, values)`` and ``silent(seconds, why)`` get times of the clock that ``now`` values are of.
    """

    def __init__(
        self,
        source: ServerSource,
        answered: Callable[[float, Mapping[str, float]], None],
        silent: Callable[[float, str], None],
    ) -> None:
        self.source, self._answered, self._silent = source, answered, silent
        self._connection: pq.abc.PGconn | None = None
        self._connecting = False
        self._wants = 0
        self._asked_at: float | None = None
        self._since = self._retry_at = float("-inf")
        self._set_up = False
        self._answers: list[pq.abc.PGresult] = []
        self._to_ask: list[str] = []

    def tick(self, now: float) -> None:
        """Ask, or connect, or see that there is still no answer."""
        if self._connection is None:
            if now >= self._retry_at:
                self._connect(now)
        elif self._connecting or self._asked_at is not None:
            self._wait_on(now)
        else:
            self._start_asking(now)

    def wanted(self) -> tuple[int, int] | None:
        """The socket and the events to poll for; None when there is nothing to wait for."""
        if self._connection is None or (self._asked_at is None and not self._connecting):
            return None
        return self._connection.socket, self._wants

    def advance(self, now: float) -> None:
        """Go on, since the socket is ready."""
        try:
            if self._connecting:
                self._poll(now)
            elif self._connection is not None:
                self._take_in(now)
        except Error as problem:
            self.drop(now, str(problem))

    def close(self) -> None:
        """Close the connection, without waiting for anybody."""
        if self._connection is not None:
            self._connection.finish()
            self._connection = None

    def drop(self, now: float, why: str) -> None:
        """Give the connection up; a tick after a moment makes another."""
        self.close()
        asked_at, self._asked_at = self._asked_at, None
        self._connection, self._connecting, self._retry_at = None, False, now + RETRY
        self._silent(now if asked_at is None else asked_at, _first_line(why))

    # --- connecting -----------------------------------------------------------------------------------------

    def _connect(self, now: float) -> None:
        try:
            self._connection = pq.PGconn.connect_start(self.source.conninfo().encode())
            self._connection.nonblocking = 1
        except Error as problem:
            self.drop(now, str(problem))
            return
        self._connecting, self._set_up = True, False
        self._since, self._wants = now, select.POLLOUT
        if self._connection.status == pq.ConnStatus.BAD:
            self._refused(now)

    def _poll(self, now: float) -> None:
        assert self._connection is not None
        status = self._connection.connect_poll()
        if status == pq.PollingStatus.OK:
            self._connecting = False
            self._start_asking(now)
        elif status == pq.PollingStatus.FAILED:
            self._refused(now)
        else:
            self._wants = select.POLLIN if status == pq.PollingStatus.READING else select.POLLOUT

    def _refused(self, now: float) -> None:
        assert self._connection is not None
        message = self._connection.get_error_message()
        self.source.refused(message)
        self.drop(now, message)

    # --- asking ---------------------------------------------------------------------------------------------

    def _start_asking(self, now: float) -> None:
        self._answers = []
        self._to_ask = list(self.source.queries if self._set_up else self.source.setup + self.source.queries)
        self._asked_at = self._since = now
        try:
            self._ask_next()
        except Error as problem:
            self.drop(now, str(problem))

    def _ask_next(self) -> None:
        assert self._connection is not None
        self._connection.send_query(self._to_ask.pop(0).encode())
        self._flush()

    def _flush(self) -> None:
        assert self._connection is not None
        unsent = self._connection.flush()
        self._wants = select.POLLIN | (select.POLLOUT if unsent else 0)

    def _take_in(self, now: float) -> None:
        assert self._connection is not None
        self._connection.consume_input()
        self._flush()
        while self._connection is not None and self._asked_at is not None and not self._connection.is_busy():
            answer = self._connection.get_result()
            if answer is not None:
                self._keep(answer, now)
            elif self._to_ask:
                self._ask_next()
            else:
                self._finish(now)

    def _keep(self, answer: pq.abc.PGresult, now: float) -> None:
        if answer.status in GOOD:
            self._answers.append(answer)
        else:
            self.drop(now, answer.get_error_message())

    def _finish(self, now: float) -> None:
        assert self._asked_at is not None
        asked_at, self._asked_at = self._asked_at, None
        answers = self._answers
        if not self._set_up:
            self.source.begin(answers[: len(self.source.setup)])
            answers, self._set_up = answers[len(self.source.setup) :], True
        if now - asked_at > GAP:
            self._silent(asked_at, "no answer in time")
            return
        self._answered(now, {**self.source.read(answers), "answer ms": (now - asked_at) * 1000})

    def _wait_on(self, now: float) -> None:
        if now - self._since > PATIENCE:
            self.drop(now, f"no answer for {PATIENCE:g} s")
        elif now - self._since > GAP:
            self._silent(self._since, "no answer")


def _first_line(message: str) -> str:
    """libpq says where it connected and then what the server said; the last is what a reader wants."""
    lines = message.strip().splitlines() or ["no answer"]
    return lines[0].split("FATAL:")[-1].strip()
