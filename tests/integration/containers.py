"""Containers and networks of connlab's, seen from outside: by their names, through docker's own client."""

from __future__ import annotations

import docker


def containers_and_networks(owner: int | None = None, address: str | None = None) -> list[str]:
    """The names of those that the process ``owner`` made (None: of all); empty where no engine answers."""
    try:
        engine = docker.DockerClient(address) if address else docker.from_env()
    except docker.errors.DockerException:
        return []
    try:
        containers = [container["Names"][0].strip("/") for container in engine.api.containers(all=True)]
        networks = [network["Name"] for network in engine.api.networks()]
    finally:
        engine.close()
    return sorted(name for name in containers + networks if name.startswith("connlab-") and _is_of(name, owner))


def _is_of(name: str, owner: int | None) -> bool:
    return owner is None or f"-{owner}-" in name
