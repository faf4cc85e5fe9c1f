"""A TCP relay in front of a node: the network between client and server, with faults on demand."""

from __future__ import annotations

from typing import Self

from connlab import configuration
from connlab.configuration import Change, Value
from connlab.errors import SettingError
from connlab.node import Node
from connlab.runtime import Address
from connlab.runtime.thread import Behaviour, RelayProgram

SETTINGS = ("delay_ms", "to_server", "to_client")


class Relay(Node):
    """Passes bytes on to a node behind it; ``pg.relay(…)`` and ``bouncer.relay(…)`` make one.

    Its own verbs: ``freeze`` lets connections open and nothing pass, ``kill`` resets all and refuses new ones,
    ``drop`` resets what is open now. ``with relay.settings(delay_ms=10): …`` changes it while connections are open.

    What a relay cannot show: its own kernel acknowledges what it receives, so keepalives and
    ``tcp_user_timeout`` never fire across it.
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
        try:
            relay._start()
        except BaseException:
            relay._relay.remove()
            raise
        relay._relay.behaviour = behaviour
        return relay

    @property
    def dsn(self) -> str:
        """The DSN of the node behind, through the relay."""
        return self._through(self._behind.dsn)

    @property
    def admin_dsn(self) -> str:
        """The administrator's DSN of the node behind, through the relay."""
        return self._through(self._behind.admin_dsn)

    def drop(self) -> int:
        """Reset every connection that is open now; returns how many."""
        self._must_exist()
        return self._relay.drop()

    def reload(self) -> None:
        """Nothing to read again: settings take effect at once."""

    def _through(self, dsn: str) -> str:
        behind: Address = self._behind.address
        return dsn.replace(f"@{behind}/", f"@{self.address}/", 1)

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
        new = _behaviour(old, settings)
        self._relay.behaviour = new
        shown, before = _shown(new), _shown(old)
        return Change(self.label, "at once", {name: shown[name] for name in settings}, before)

    def _restore(self, change: Change) -> None:
        self._relay.behaviour = _behaviour(
            Behaviour(),
            {name: float(value) if name == "delay_ms" else value == "True" for name, value in change.old.items()},
        )


def _behaviour(old: Behaviour, settings: dict[str, Value]) -> Behaviour:
    unknown = next((name for name in settings if name not in SETTINGS), None)
    if unknown is not None:
        hint = configuration.did_you_mean(unknown, SETTINGS) or f"it has {', '.join(SETTINGS)}"
        raise SettingError(f"a relay has no setting {unknown}; {hint}")
    delay = settings.get("delay_ms", old.delay * 1000)
    if isinstance(delay, str | bool) or not 0 <= delay <= 60_000:
        raise SettingError(f"delay_ms takes a number of milliseconds from 0 to 60000, not {delay!r}")
    flags = {name: settings.get(name, getattr(old, name)) for name in ("to_server", "to_client")}
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise SettingError(f"{name} takes True (bytes pass) or False (mute), not {value!r}")
    return Behaviour(delay / 1000, bool(flags["to_server"]), bool(flags["to_client"]))


def _shown(behaviour: Behaviour) -> dict[str, str]:
    return {
        "delay_ms": f"{behaviour.delay * 1000:g}",
        "to_server": str(behaviour.to_server),
        "to_client": str(behaviour.to_client),
    }
