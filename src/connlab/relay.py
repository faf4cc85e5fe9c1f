"""A TCP relay in front of a node: the network between client and server, with faults on demand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Self, get_args

from connlab import configuration
from connlab.configuration import Change, Value
from connlab.errors import SettingError
from connlab.node import Node
from connlab.runtime import Address
from connlab.runtime.passing import Behaviour
from connlab.runtime.thread import How, RelayProgram

SETTINGS = tuple(setting.name for setting in dataclasses.fields(Behaviour))


@dataclass(frozen=True)
class RelayChange(Change):
    """What ``with relay.settings(…)`` did; ``before`` is the behaviour as it was."""

    before: Behaviour = field(default=Behaviour(), repr=False)


class Relay(Node):
    """Passes bytes on to a node behind it; ``pg.relay(…)`` and ``bouncer.relay(…)`` make one.

    Settings, for each direction: ``delay_ms``; ``jitter_ms``, a random part of which comes on top (uniform from 0;
    ``seed``, a whole number, repeats the sequence); ``kb_per_s``, the kB (1,000 bytes) a second that all its
    connections share; ``to_server`` and ``to_client`` False for mute: bytes wait until it speaks again. Order is kept.
    ``with relay.settings(delay_ms=10): …`` changes them while connections are open. Delays are kept to about 1 ms.

    Its own verbs: ``freeze`` lets connections open and nothing pass, ``kill`` resets all and refuses new ones,
    ``drop`` ends what is open now, in one of three ways.

    What a relay cannot show: its own kernel acknowledges what it receives, so keepalives and
    ``tcp_user_timeout`` never fire across it, and there are no packets that it could lose.

    Example:
        >>> with pg.relay(delay_ms=10, jitter_ms=5, seed=1) as relay, psycopg.connect(relay.dsn) as conn:
        ...     conn.execute("select 1").fetchone()
        (1,)
    """

    label = "relay"

    def __init__(self, behind: Node, program: RelayProgram) -> None:
        super().__init__(program)
        self._behind, self._relay = behind, program

    @classmethod
    def in_front_of(cls, behind: Node, settings: dict[str, Value]) -> Self:
        """Start a relay in front of ``behind`` and return once a query has gone through it."""
        behaviour = _behaviour(Behaviour(), settings)
        relay = cls(behind, RelayProgram(behind.address))
        behind._fronts.append(relay)  # before it starts: an interrupt comes between any two steps
        try:
            relay._start()
            relay._relay.behaviour = behaviour
            return relay
        except BaseException:
            behind._fronts.remove(relay)
            relay._relay.remove()
            raise

    @property
    def dsn(self) -> str:
        """The DSN of the node behind, through the relay."""
        return self._through(self._behind.dsn)

    @property
    def admin_dsn(self) -> str:
        """The administrator's DSN of the node behind, through the relay."""
        return self._through(self._behind.admin_dsn)

    def drop(self, how: How = "reset") -> int:
        """End every connection that is open now; returns how many. New ones are served.

        ``"reset"``: a TCP reset on both sides, as a firewall or a crashed machine sends. ``"close"``: both sides are
        closed in order (FIN), as by a load balancer's idle timeout. libpq says "server closed the connection
        unexpectedly" of both. ``"silent"``: nobody is told, and whatever either side sends is
        swallowed from now on, as by a NAT that has forgotten the connection. Raises SettingError for another.
        """
        self._must_exist()
        if how not in get_args(How):
            raise SettingError(f"a connection is dropped by {', '.join(map(repr, get_args(How)))}, not {how!r}")
        return self._relay.drop(how)

    def reset(self) -> int:
        """Reset every connection that is open now; returns how many. The same as ``drop("reset")``."""
        return self.drop("reset")

    def reload(self) -> None:
        """Nothing to read again: settings take effect at once."""

    def _through(self, dsn: str) -> str:
        behind: Address = self._behind.address
        return dsn.replace(f"@{behind}/", f"@{self.address}/", 1)

    def _start(self) -> None:
        """As every node's; it passes everything until it has been seen to work."""
        wanted, self._relay.behaviour = self._relay.behaviour, Behaviour()
        try:
            super()._start()
        finally:
            self._relay.behaviour = wanted

    def _arguments(self) -> list[str]:
        return []

    def _configuration(self) -> str:
        return ""

    def _shut_down_signals(self) -> list[int]:
        return []

    def _reason(self, log: str) -> str:
        return log.splitlines()[-1] if log else ""

    def _change(self, settings: dict[str, Value]) -> Change:
        old = self._relay.behaviour
        new = self._relay.behaviour = _behaviour(old, settings)
        return RelayChange(self.label, "at once", _shown(new, settings), _shown(old, SETTINGS), before=old)

    def _restore(self, change: Change) -> None:
        assert isinstance(change, RelayChange)
        old = {name: getattr(change.before, name) for name in change.new}
        self._relay.behaviour = dataclasses.replace(self._relay.behaviour, **old)


def _behaviour(old: Behaviour, settings: Mapping[str, Value]) -> Behaviour:
    unknown = next((name for name in settings if name not in SETTINGS), None)
    if unknown is not None:
        hint = configuration.did_you_mean(unknown, SETTINGS) or f"it has {', '.join(SETTINGS)}"
        raise SettingError(f"a relay has no setting {unknown}; {hint}")
    for name, value in settings.items():
        right, what = TAKES[name]
        if not right(value):
            raise SettingError(f"{name} takes {what}, not {value!r}")
    return dataclasses.replace(old, **settings)  # type: ignore[arg-type]  # TAKES has looked


def _is_number(value: Value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_delay(value: Value) -> bool:
    return _is_number(value) and 0 <= float(value) <= 60_000


def _is_speed(value: Value) -> bool:
    return _is_number(value) and float(value) > 0


def _is_seed(value: Value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_flag(value: Value) -> bool:
    return isinstance(value, bool)


DELAY = (_is_delay, "a number of milliseconds from 0 to 60000")
FLAG = (_is_flag, "True (bytes pass) or False (mute)")
TAKES: dict[str, tuple[Callable[[Value], bool], str]] = {
    "delay_ms": DELAY,
    "jitter_ms": DELAY,
    "kb_per_s": (_is_speed, "a number of kB (1,000 bytes) a second above 0, or float('inf') for no limit"),
    "to_server": FLAG,
    "to_client": FLAG,
    "seed": (_is_seed, "a whole number"),
}


def _shown(behaviour: Behaviour, names: Iterable[str]) -> dict[str, str]:
    values = {name: getattr(behaviour, name) for name in names}
    return {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in values.items()}
