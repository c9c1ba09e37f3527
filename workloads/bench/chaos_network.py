"""Network namespaces joined by a bridge: nodes of one machine that can be cut off from the others.

A cut takes the node's port off the bridge. Packets are then dropped both ways without a word: no carrier is lost
and no route goes, so that neither side is told, as when a switch fails.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from cluster.errors import ExpertmeshError

_NAMES = Path("/run/netns")
_LINKS = Path("/sys/class/net")
# Private addresses that few networks use; which of its 254 nets is free is tried.
_NET = "10.213"
WAY_OUT = "run it as root with iproute2, where network namespaces and bridges can be made"


def why_not() -> str | None:
    """Why no namespaces can be made here; None if they can, which is tried."""
    if os.geteuid() != 0:
        return "network namespaces are made by root alone"
    if shutil.which("ip") is None:
        return "the command ip is not there (Debian: apt-get install iproute2)"
    try:
        network = Network()
    except ExpertmeshError as error:
        return error.message
    try:
        network.add_namespace("tried")
    except ExpertmeshError as error:
        return error.message
    finally:
        network.close()
    return None


class Network:
    """A bridge with an address for this machine, and namespaces on it. Closed with `close`."""

    def __init__(self) -> None:
        """ExpertmeshError if it can't be made here."""
        self._id = f"em{secrets.token_hex(3)}"
        self._bridge = f"{self._id}br"
        self._ports: dict[str, str] = {}
        self._net = _free_net(_ip("-br", "-4", "addr"))
        self._next = 1
        try:
            # With an address of its own: a bridge takes its ports' else, and would hear one that is cut off.
            mac = ":".join(["02", *(f"{byte:02x}" for byte in secrets.token_bytes(5))])
            _ip("link", "add", self._bridge, "address", mac, "type", "bridge")
            self.here = self.add_address()
            _ip("link", "set", self._bridge, "up")
        except BaseException:
            self.close()
            raise

    def add_address(self) -> str:
        """One more address of this machine on the bridge."""
        address = self._new_address()
        _ip("addr", "add", f"{address}/24", "dev", self._bridge)
        return address

    def add_namespace(self, node: str) -> tuple[str, Sequence[str]]:
        """A namespace for a node: its address, and what comes before a command that runs in it."""
        number = len(self._ports)
        name, port, address = f"{self._id}n{number}", f"{self._id}v{number}", self._new_address()
        # Kept first: whatever fails below is undone by `close`.
        self._ports[node] = port
        _ip("netns", "add", name)
        _ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("link", "set", port, "master", self._bridge)
        _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
        for command in (["link", "set", port, "up"], ["-n", name, "link", "set", "eth0", "up"]):
            _ip(*command)
        _ip("-n", name, "link", "set", "lo", "up")
        return address, ("ip", "netns", "exec", name)

    def cut(self, node: str) -> None:
        """Drop everything from and to the node."""
        _ip("link", "set", self._ports[node], "nomaster")

    def heal(self, node: str) -> None:
        """Let everything pass again."""
        _ip("link", "set", self._ports[node], "master", self._bridge)

    def close(self) -> list[str]:
        """Take everything away; names of what could not be."""
        for number in range(len(self._ports)):
            _try_ip("netns", "del", f"{self._id}n{number}")
            # With the namespace goes its end of the pair, and the other with that, but a moment later.
            _try_ip("link", "del", f"{self._id}v{number}")
        _try_ip("link", "del", self._bridge)
        return sorted(
            entry.name
            for folder in (_NAMES, _LINKS)
            if folder.is_dir()
            for entry in folder.iterdir()
            if entry.name.startswith(self._id)
        )

    def _new_address(self) -> str:
        address = f"{self._net}.{self._next}"
        self._next += 1
        return address


def _free_net(addresses: str) -> str:
    """The first three numbers of a /24 of which no address is in use here."""
    free = [f"{_NET}.{n}" for n in range(1, 255) if f" {_NET}.{n}." not in addresses]
    if not free:
        raise ExpertmeshError(f"every net of {_NET}.0.0/16 is in use on this machine")
    return secrets.choice(free)


def _ip(*arguments: str) -> str:
    try:
        done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=30)
    except OSError as error:
        raise ExpertmeshError(f"`ip` can't be run: {error.strerror}", WAY_OUT) from error
    if done.returncode != 0:
        raise ExpertmeshError(
            f"`ip {' '.join(arguments)}` failed: {done.stderr.strip()}",
            WAY_OUT,
        )
    return done.stdout


def _try_ip(*arguments: str) -> None:
    with contextlib.suppress(OSError):
        subprocess.run(["ip", *arguments], capture_output=True, timeout=30)
