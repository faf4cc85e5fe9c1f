"""The private network of a process's containers: one, for as long as it has any."""

from __future__ import annotations

import os
import random
import threading
import time
from dataclasses import dataclass
from ipaddress import IPv4Network

from connlab import janitor
from connlab.engine import Engine
from connlab.errors import EngineError, StartError
from connlab.reaper import IN_FLIGHT

RANGE = IPv4Network("198.18.0.0/15")
"""Set aside for benchmarks (RFC 2544): neither a home's nor an office's network, nor among those that Docker takes."""
FIRST = 2
"""The first address is the machine's own."""


@dataclass(frozen=True)
class Place:
    """An address on the network that stays a container's own while others come and go."""

    network: str
    """The network's id."""
    address: str


class Network:
    """Makes the network with the first container and removes it with the last."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._network = ""  # its id: two may have the same name
        self._subnet = RANGE
        self._taken: dict[str, str] = {}

    def join(self, member: str) -> Place:
        """A place for one more container, of that name. Raises EngineError, StartError."""
        with self._lock:
            if not self._network:
                self._network = self._make()
            self._taken[member] = self._free_address()
            return Place(self._network, self._taken[member])

    def leave(self, member: str) -> None:
        """Give the place of ``member`` back; its container is gone. Twice, and never having joined, are no error."""
        with self._lock:
            self._taken.pop(member, None)
            if self._taken or not self._network:
                return
            network, self._network = self._network, ""
            with self._engine.asking(f"remove the network {network}"):
                self._engine.api.remove_network(network)

    def _free_address(self) -> str:
        for number in range(FIRST, self._subnet.num_addresses - 1):
            if (address := str(self._subnet[number])) not in self._taken.values():
                return address
        raise StartError(f"more than {len(self._taken)} containers at once", hint="stop some")

    def _make(self) -> str:
        """Try until the subnet is one that nobody has."""
        refused = EngineError("no subnet was tried")
        for subnet in random.SystemRandom().sample(list(RANGE.subnets(new_prefix=24)), 20):
            try:
                made = self._make_with(subnet)
            except EngineError as problem:
                if "overlap" not in str(problem) and "conflict" not in str(problem):
                    raise
                refused = problem
            else:
                self._subnet = subnet
                return made
        raise refused

    def _make_with(self, subnet: IPv4Network) -> str:
        from docker.types import IPAMConfig, IPAMPool

        name, labels = janitor.owner().container("network", self._engine.address)
        with self._engine.asking(f"make the network {name} with {subnet}"):
            try:
                made = self._engine.api.create_network(
                    name,
                    driver="bridge",
                    ipam=IPAMConfig(pool_configs=[IPAMPool(subnet=str(subnet))]),
                    labels=labels,
                    options={"com.docker.network.bridge.host_binding_ipv4": "127.0.0.1"},
                )
            except KeyboardInterrupt:  # the engine may still make it, and nobody would know
                self._remove_soon(name)
                raise
        return str(made["Id"])

    def _remove_soon(self, name: str) -> None:
        deadline = time.monotonic() + IN_FLIGHT
        while time.monotonic() < deadline:
            for found in self._engine.api.networks(names=[name]):
                self._engine.api.remove_network(found["Id"])
                return
            time.sleep(0.05)


_networks: dict[tuple[int, str], Network] = {}


def network(engine: Engine) -> Network:
    """The one of this process; a forked child has another."""
    return _networks.setdefault((os.getpid(), engine.address), Network(engine))
