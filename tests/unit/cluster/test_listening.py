"""Only a node that was reached and then refuses is gone."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.listening import Listening

Address = tuple[str, int]


@contextmanager
def daemon(port: int = 0) -> Iterator[Address]:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen()
        yield listener.getsockname()


@contextmanager
def silent() -> Iterator[Address]:
    """Of a listener whose queue is full the kernel drops what comes: nobody accepts, nobody refuses."""
    with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for filler in (first, second):
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield listener.getsockname()


def test_a_node_that_ends_is_gone_and_stays_gone() -> None:
    listening = Listening()
    with daemon() as a, daemon() as b:
        assert listening.gone({"a": a, "b": b}) == frozenset()
    with daemon(b[1]) as b:
        assert listening.gone({"a": a, "b": b}) == {"a"}
    # Somebody else has its port now.
    with daemon(a[1]), daemon(b[1]):
        assert listening.gone({"a": a, "b": b}) == {"a"}
    assert listening.gone({}) == frozenset()


def test_one_that_never_answered_may_be_behind_a_firewall() -> None:
    with daemon() as address:
        pass
    listening = Listening()
    assert listening.gone({"a": address}) == listening.gone({"a": address}) == frozenset()


def test_silence_is_not_an_end() -> None:
    listening = Listening()
    with daemon() as good, silent() as cut:
        assert listening.gone({"a": good, "b": good}) == frozenset()
        assert listening.gone({"a": cut, "b": good}) == frozenset()


def test_an_address_that_makes_no_sense_says_nothing() -> None:
    assert Listening().gone({"a": ("no.such.name.invalid", 1), "b": ("::1", 1)}) == frozenset()
