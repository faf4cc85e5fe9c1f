"""A port that is held is one where connections come to us."""

from __future__ import annotations

import subprocess
import sys

import pytest

FIRST_HALF = "25000:25099"
SOMEBODY = "127.0.0.1:24999"
HOLD = (
    "import socket; from connlab.runtime import ports; ports.RANGE = range(25000, 25200); "
    "somebody = socket.create_server(('127.0.0.1', 24999)); print(ports.hold({}).number)"
)
RULES = ["-j DROP", f"-t nat -j DNAT --to {SOMEBODY}", "-t nat -j DNAT --to 198.51.100.1"]


def hold(rule: str, argument: str) -> str:
    """What holding a port prints in a network of its own, where ``rule`` takes the first half of the ports away."""
    first = f"ip link set lo up && iptables -A OUTPUT -d 127.0.0.1 -p tcp --dport {FIRST_HALF} {rule}"
    command = ["unshare", "--net", "sh", "-c", f'{first} && {sys.executable} -c "{HOLD.format(argument)}"']
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout


@pytest.mark.machine
@pytest.mark.parametrize("rule", RULES)
def test_a_port_that_the_firewall_takes_away_is_not_chosen(rule: str) -> None:
    """Such rules stay behind when a container engine is killed; a server there would seem not to start."""
    assert all(25100 <= int(hold(rule, "")) < 25200 for _ in range(10))


@pytest.mark.machine
@pytest.mark.parametrize("rule", RULES)
def test_a_port_that_was_asked_for_and_goes_elsewhere_is_an_error(rule: str) -> None:
    printed = hold(rule, "25000")
    assert "StartError: port 25000 of 127.0.0.1 cannot be had" in printed and "firewall" in printed
    assert hold(rule, "25150") == "25150\n"
