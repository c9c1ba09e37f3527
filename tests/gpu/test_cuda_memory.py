"""Memory that one process lends and another maps: it outlives whoever lent it, and is free when it is let go."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket

import torch

from actors.cuda_memory import CudaSlots

SLOT = 8 << 20


def lend(sock: socket.socket, slots: int) -> None:
    """A process that fills slots with their number and lends them, until it is killed."""
    mine = CudaSlots(0, slots, SLOT)
    for slot in range(slots):
        mine.take(slot)
        mine.bytes()[slot].fill_(slot + 1)
    torch.cuda.synchronize()
    for slot in range(slots):
        descriptor = mine.export(slot)
        socket.send_fds(sock, [b"x"], [descriptor])
        os.close(descriptor)
    sock.recv(1)


def test_memory_outlives_its_lender_and_is_free_when_it_is_let_go() -> None:
    torch.cuda.init()
    slots = 64
    ours, theirs = socket.socketpair()
    process = multiprocessing.get_context("spawn").Process(target=lend, args=(theirs, slots))
    process.start()
    theirs.close()
    mapped = CudaSlots(0, slots + 1, SLOT)
    for slot in range(slots):
        _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
        mapped.attach(slot, descriptors[0])
    view = mapped.bytes()
    assert [int(view[slot].max()) for slot in range(slots)] == list(range(1, slots + 1))

    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert [int(view[slot].min()) for slot in range(slots)] == list(range(1, slots + 1))

    torch.cuda.synchronize()
    before, _ = torch.cuda.mem_get_info()
    for slot in range(slots):
        mapped.release(slot)
    after, _ = torch.cuda.mem_get_info()
    assert after - before >= slots * SLOT


def test_one_slot_can_be_seen_in_several_places() -> None:
    zeros, many = CudaSlots(0, 1, SLOT), CudaSlots(0, 3, SLOT)
    zeros.take(0)
    zeros.bytes().fill_(7)
    for slot in range(3):
        many.alias(slot, zeros, 0)
    assert int(many.bytes().min()) == int(many.bytes().max()) == 7
    many.release(1)
    assert not many.has(1)
    many.take(1)
    many.bytes()[1].fill_(9)
    assert int(zeros.bytes().max()) == 7
