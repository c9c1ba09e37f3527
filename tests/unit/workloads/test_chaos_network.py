"""Nodes with a network of their own: cut off without a word, healed, and nothing left behind."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator

import pytest

from cluster.errors import ExpertmeshError
from workloads.bench import chaos_network
from workloads.bench.chaos_network import Network, _free_net, why_not


def test_who_can_not_make_them_is_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert "root" in (why_not() or "")
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "iproute2" in (why_not() or "")


def test_a_net_in_use_is_not_taken() -> None:
    all_but_two = "\n".join(f"eth{n} UP 10.213.{n}.1/24" for n in range(1, 255) if n not in (7, 70))
    assert {_free_net(all_but_two) for _ in range(50)} == {"10.213.7", "10.213.70"}
    with pytest.raises(ExpertmeshError, match="in use"):
        _free_net("\n".join(f"eth{n} UP 10.213.{n}.1/24" for n in range(1, 255)))


@pytest.fixture
def network() -> Iterator[Network]:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    made = Network()
    try:
        yield made
    finally:
        assert made.close() == []


def test_a_cut_is_silent_and_heals(network: Network) -> None:
    address, prefix = network.add_namespace("far")
    near, _ = network.add_namespace("near")
    program = (
        f"import socket; s = socket.create_server(({address!r}, 0)); print(s.getsockname()[1], flush=True);"
        "c, _ = s.accept(); c.sendall(c.recv(9)); c.recv(9)"
    )
    listener = subprocess.Popen([*prefix, "python3", "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert listener.stdout is not None
        with socket.create_connection((address, int(listener.stdout.readline())), 5) as link:
            network.cut("far")
            link.settimeout(0.3)
            link.sendall(b"rows")
            with pytest.raises(TimeoutError):
                link.recv(9)
            # The other one goes on: nobody listens, and its kernel says so.
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((near, 9), 5)
            network.heal("far")
            link.settimeout(10)
            assert link.recv(9) == b"rows"
    finally:
        listener.kill()
        listener.wait()
        assert listener.stdout is not None
        listener.stdout.close()


def test_what_can_not_be_made_leaves_nothing(monkeypatch: pytest.MonkeyPatch, network: Network) -> None:
    monkeypatch.setattr(chaos_network, "_free_net", lambda addresses: "not.an.address")
    before = {name for _, name in socket.if_nameindex()}
    with pytest.raises(ExpertmeshError, match="ip addr add"):
        Network()
    assert {name for _, name in socket.if_nameindex()} == before
