"""Placements to compare with: EPLB, round-robin and random. One layer each; every slot is filled.

EPLB is DeepSeek's, from its description (github.com/deepseek-ai/EPLB, README; DeepSeek-V3 report, section 3.4): the
expert with the most load per copy gets the next copy until the slots are used up; then copies, heaviest first, go to
the least loaded GPU that has a free slot. Replicas share their expert's load evenly. It may put two copies of an
expert on one GPU, and takes all GPUs as equal.
"""

from __future__ import annotations

import heapq

import numpy as np

Copies = tuple[np.ndarray, np.ndarray]
"""int [R] experts and int [R] hosts of all copies."""


def eplb(load: np.ndarray, slots: np.ndarray) -> Copies:
    """Balanced by the loads [E], on hosts with `slots` [H]."""
    copies = np.ones(len(load), np.int64)
    queue = [(-value, expert) for expert, value in enumerate(load)]
    heapq.heapify(queue)
    for _ in range(int(slots.sum()) - len(load)):
        _, expert = heapq.heappop(queue)
        copies[expert] += 1
        heapq.heappush(queue, (-load[expert] / copies[expert], expert))
    experts = np.repeat(np.arange(len(load)), copies)
    weights = load[experts] / copies[experts]
    order = np.argsort(-weights, kind="stable")
    hosts = np.empty(len(experts), np.int64)
    packs = [(0.0, host) for host in range(len(slots)) if slots[host]]
    heapq.heapify(packs)
    left = slots.copy()
    for copy in order:
        total, host = heapq.heappop(packs)
        hosts[copy] = host
        left[host] -= 1
        if left[host]:
            heapq.heappush(packs, (total + weights[copy], host))
    return experts, hosts


def round_robin(experts: int, slots: np.ndarray) -> Copies:
    """Experts in turn, over and over, to hosts in turn, as long as there is room."""
    chosen = np.arange(int(slots.sum())) % experts
    return chosen, _in_turn(slots)


def at_random(experts: int, slots: np.ndarray, rng: np.random.Generator) -> Copies:
    """Every expert once, the rest of the slots drawn evenly, all in random order."""
    extra = rng.integers(experts, size=int(slots.sum()) - experts)
    return rng.permutation(np.concatenate([np.arange(experts), extra])), _in_turn(slots)


def even_levels(copies: Copies, load: np.ndarray, hosts: int) -> np.ndarray:
    """[H]: what comes to each host when the copies of an expert share its load [E] evenly."""
    experts, where = copies
    number = np.bincount(experts, minlength=len(load))
    return np.bincount(where, load[experts] / number[experts], hosts)


def _in_turn(slots: np.ndarray) -> np.ndarray:
    turns = [np.flatnonzero(slots > turn) for turn in range(int(slots.max()))]
    return np.concatenate(turns)
