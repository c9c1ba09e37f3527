"""Host servers and a dispatcher over real sockets in one process: answers, refusals, loss and return."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

import numpy as np
import pytest
import torch

from actors import json_stream
from actors.buffers import Layout
from actors.dispatch import Dispatcher
from actors.host_server import HostServer
from actors.link import HostLink
from actors.route import fixed_route
from cluster.errors import HostError, ProtocolError
from tests.unit.actors.host_mesh import EXPERTS, HIDDEN, KEY, LAYER, MANIFEST, TOP_K, batch

ONE, TWO, THREE = [(0, 1, 2, 3, 4, 5)], [(0, 2, 4), (1, 3, 5)], [(5, 0), (1, 2), (4, 3)]


@pytest.mark.parametrize("owned", [ONE, TWO, THREE], ids=["1-host", "2-hosts", "3-hosts"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 7, 16, 41])
def test_sums_arrive_in_place(make_mesh, transport: str, owned, dtype: str, rows: int) -> None:
    """41 rows on a connection made for 16 go in three rounds."""
    dispatcher = make_mesh(owned, dtype, transport).dispatcher()
    x, weights, ids, expected = batch(rows, dtype)
    out = torch.full_like(x, 99.0)
    dispatcher(LAYER, x, weights, ids, out)
    tolerance = 1e-6 if dtype == "float32" else 2e-2
    torch.testing.assert_close(out.float(), expected, rtol=tolerance, atol=tolerance)
    assert dispatcher.stats.rows == rows


def test_the_same_rows_give_the_same_bits(make_mesh) -> None:
    mesh = make_mesh(THREE)
    dispatcher = mesh.dispatcher()
    x, weights, ids, _ = batch(16, "float32")
    first, again = torch.empty_like(x), torch.empty_like(x)
    dispatcher(LAYER, x, weights, ids, first)
    # Another host answers last now; the sum's order must not follow.
    mesh.experts[0].before = lambda: time.sleep(0.02)
    dispatcher(LAYER, x, weights, ids, again)
    assert torch.equal(first, again)


def test_all_hosts_are_asked_before_the_first_answer(make_mesh) -> None:
    """Two hosts that each wait for the other can only both answer if both were asked at once."""
    mesh = make_mesh(TWO)
    both = threading.Barrier(2, timeout=5)
    for experts in mesh.experts:
        experts.before = lambda: both.wait() and None
    dispatcher = mesh.dispatcher()
    x, weights, ids, expected = batch(16, "float32")
    out = torch.empty_like(x)
    dispatcher(LAYER, x, weights, ids, out)
    torch.testing.assert_close(out, expected)


def test_several_engines_share_a_host(make_mesh, transport: str) -> None:
    mesh = make_mesh(TWO, "float32", transport)
    failures: list[BaseException] = []

    def engine(rows: int) -> None:
        try:
            dispatcher = mesh.dispatcher()
            x, weights, ids, expected = batch(rows, "float32")
            for _ in range(50):
                out = torch.empty_like(x)
                dispatcher(LAYER, x, weights, ids, out)
                torch.testing.assert_close(out, expected)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=engine, args=(rows,)) for rows in (1, 5, 16, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_host_lost_in_the_middle_of_a_dispatch(make_mesh) -> None:
    mesh = make_mesh(ONE)
    dispatcher = mesh.dispatcher()
    died = threading.Event()

    def die() -> None:
        if not died.is_set():
            died.set()
            old = mesh.servers[0]
            connections, old._connections = old._connections, set()
            old.close()
            # It listens again before the old connection ends, or the next attempt would come too early now and then.
            mesh.restart(0)
            for sock in connections:
                sock.shutdown(socket.SHUT_RDWR)

    mesh.experts[0].before = die
    x, weights, ids, expected = batch(4, "float32")
    out = torch.empty_like(x)
    dispatcher(LAYER, x, weights, ids, out)
    torch.testing.assert_close(out, expected)


def test_a_lost_host_is_named(make_mesh, transport: str) -> None:
    mesh = make_mesh(TWO, "float32", transport)
    dispatcher = mesh.dispatcher()
    mesh.servers[1].close()
    x, weights, ids, _ = batch(9)
    with pytest.raises(HostError, match=r"no living host holds expert \d of layer 3 \(expert host h1"):
        dispatcher(LAYER, x, weights, ids, torch.empty_like(x))


def test_a_hosts_refusal_carries_its_words_and_the_connection_lives_on(make_mesh, transport: str) -> None:
    mesh = make_mesh(ONE, "float32", transport)
    everywhere = [0] * EXPERTS
    dispatcher = mesh.dispatcher(
        route=fixed_route(MANIFEST, 1, mesh.addresses, {LAYER: everywhere, 9: everywhere})
    )
    x, weights, ids, expected = batch(4, "float32")
    out = torch.empty_like(x)
    with pytest.raises(HostError, match="no experts of layer 9"):
        dispatcher(9, x, weights, ids, out)
    wrong = ids.clone()
    wrong[0, 0] = EXPERTS + 5
    with pytest.raises(IndexError, match="out of bounds"):
        dispatcher(LAYER, x, weights, wrong, out)
    dispatcher(LAYER, x, weights, ids, out)
    torch.testing.assert_close(out, expected)


def test_an_expert_that_lives_elsewhere_is_refused_by_number(make_mesh) -> None:
    mesh = make_mesh([(0, 1, 2)])
    route = fixed_route(MANIFEST, 1, mesh.addresses, {LAYER: [0] * EXPERTS})
    layout = Layout(16, HIDDEN, TOP_K, "float32")
    dispatcher = Dispatcher(route, layout, node_id="here", model="model", key=KEY, deadline_s=5)
    dispatcher.peers.connect(5)
    ids = torch.tensor([[1, 4]], dtype=torch.int32)
    with pytest.raises(HostError, match=r"does not hold experts \[4\]"):
        dispatcher(LAYER, torch.ones(1, HIDDEN), torch.ones(1, TOP_K), ids, torch.empty(1, HIDDEN))


def test_another_manifest_is_refused(make_mesh) -> None:
    mesh = make_mesh(ONE)
    route = fixed_route("cd" * 32, 1, mesh.addresses, {LAYER: [0] * EXPERTS})
    layout = Layout(16, HIDDEN, TOP_K, "float32")
    dispatcher = Dispatcher(route, layout, node_id="here", model="model", key=KEY, deadline_s=5)
    dispatcher.peers.connect(5)
    x, weights, ids, _ = batch(2, "float32")
    with pytest.raises(HostError, match="manifest"):
        dispatcher(LAYER, x, weights, ids, torch.empty_like(x))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": b"wrong"}, "could not prove"),
        ({"model": "another"}, "holds model"),
        ({"layout": Layout(16, HIDDEN, TOP_K, "bfloat16")}, "bfloat16"),
        ({"layout": Layout(16, HIDDEN * 2, TOP_K, "float32")}, "rows of 16"),
        ({"layout": Layout(1 << 21, HIDDEN, TOP_K, "float32")}, "out of range"),
    ],
    ids=["key", "model", "dtype", "hidden", "rows"],
)
def test_a_wrong_handshake_is_refused_with_the_reason(
    make_mesh, transport: str, changes, message: str
) -> None:
    mesh = make_mesh(ONE, "float32", transport)
    with pytest.raises(ProtocolError, match=message):
        mesh.dispatcher(**changes)
    mesh.dispatcher()  # the host serves on


def test_another_protocol_version_is_refused(make_mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = make_mesh(ONE)
    send = json_stream.send

    def lie(sock: socket.socket, message: dict, fd: int = -1) -> None:
        send(
            sock,
            {**message, "protocol": 99} if "proof" not in message and "nonce" in message else message,
            fd,
        )

    monkeypatch.setattr(json_stream, "send", lie)
    with pytest.raises(ProtocolError, match="protocol"):
        mesh.dispatcher()


def test_a_stranger_does_not_disturb_the_host(make_mesh) -> None:
    mesh = make_mesh(ONE)
    ip, port = mesh.addresses[0].tcp.split(":")
    for noise in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 200, b"\x02\x00\x00\x00{]"):
        with socket.create_connection((ip, int(port)), 5) as stranger:
            stranger.sendall(noise)
            stranger.settimeout(5)
            # An error message, then the host closes; what it had not read makes that a reset.
            with contextlib.suppress(ConnectionResetError):
                while stranger.recv(4096):
                    pass
    x, weights, ids, expected = batch(3, "float32")
    out = torch.empty_like(x)
    mesh.dispatcher()(LAYER, x, weights, ids, out)
    torch.testing.assert_close(out, expected)


def test_a_frame_that_does_not_fit_the_connection_ends_it(make_mesh) -> None:
    mesh = make_mesh(ONE)
    link = HostLink(
        mesh.addresses[0], Layout(4, HIDDEN, TOP_K, "float32"), local=True, model="model", key=KEY
    )
    link.connect(5)
    link.set_deadline(5)
    link.set_epoch(int(MANIFEST[:16], 16), 1)
    link.send(LAYER, 5)
    with pytest.raises(ConnectionError):
        link.receive()


def test_ping_measures_every_host(make_mesh, transport: str) -> None:
    dispatcher = make_mesh(THREE, "float32", transport).dispatcher()
    times = dispatcher.peers.reachable()
    assert set(times) == {"h0", "h1", "h2"}
    assert all(0 < seconds < 5 for seconds in times.values())


def test_no_shared_memory_has_a_name(make_mesh) -> None:
    from pathlib import Path

    before = set(Path("/dev/shm").iterdir())
    dispatcher = make_mesh(ONE).dispatcher()
    x, weights, ids, _ = batch(3, "float32")
    dispatcher(LAYER, x, weights, ids, torch.empty_like(x))
    assert set(Path("/dev/shm").iterdir()) == before


def test_a_name_in_use_is_one_clear_error(make_mesh) -> None:
    mesh = make_mesh(ONE)
    other = HostServer("h9", {}, manifest=0, model="m", dtype="float32", hidden=1, key=KEY)
    with pytest.raises(HostError, match="can't be taken"):
        other.listen_unix(mesh.addresses[0].unix)


def test_layout_offsets_do_not_overlap() -> None:
    layout = Layout(5, 7, 3, "bfloat16")
    ids, weights, x, out, end = layout.offsets()
    assert (
        ids + 5 * 3 * 4 <= weights
        and weights + 5 * 3 * 4 <= x
        and x + 5 * 7 * 2 <= out
        and out + 5 * 7 * 2 <= end
    )
    assert all(np.mod(offset, 64) == 0 for offset in (ids, weights, x, out))
