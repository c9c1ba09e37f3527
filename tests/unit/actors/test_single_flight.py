"""One question at a time, whoever asks, and a good answer kept for a moment."""

from __future__ import annotations

import asyncio

import pytest

from actors.single_flight import SingleFlight


class Oracle:
    """Answers with the number of times it was asked, or fails."""

    def __init__(self) -> None:
        self.asked = 0
        self.go = asyncio.Event()
        self.failure: Exception | None = None

    async def __call__(self) -> int:
        self.asked += 1
        asked = self.asked
        await self.go.wait()
        if self.failure is not None:
            raise self.failure
        return asked


async def waiting(oracle: Oracle, flight: SingleFlight[int], count: int) -> list[asyncio.Task[int]]:
    tasks = [asyncio.create_task(flight()) for _ in range(count)]
    while not oracle.asked:
        await asyncio.sleep(0)
    return tasks


def test_all_who_wait_get_the_same_answer_and_so_does_who_asks_soon() -> None:
    async def test() -> None:
        oracle = Oracle()
        flight = SingleFlight(oracle, keep_s=0.05)
        tasks = await waiting(oracle, flight, 50)
        oracle.go.set()
        assert await asyncio.gather(*tasks) == [1] * 50
        assert await flight() == 1
        await asyncio.sleep(0.06)
        assert await flight() == 2

    asyncio.run(test())


def test_a_failure_reaches_all_who_wait_and_is_not_kept() -> None:
    async def test() -> None:
        oracle = Oracle()
        flight = SingleFlight(oracle, keep_s=60)
        tasks = await waiting(oracle, flight, 3)
        oracle.failure = OSError("gone")
        oracle.go.set()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert answers == [oracle.failure] * 3 and oracle.asked == 1
        oracle.failure = None
        assert await flight() == 2

    asyncio.run(test())


def test_who_leaves_does_not_take_the_answer_from_the_others() -> None:
    async def test() -> None:
        oracle = Oracle()
        flight = SingleFlight(oracle, keep_s=60)
        first, other = await waiting(oracle, flight, 2)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        oracle.go.set()
        assert await other == 1

    asyncio.run(test())


def test_a_failure_that_nobody_waits_for_is_forgotten() -> None:
    async def test() -> None:
        reported: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: reported.append(context))
        oracle = Oracle()
        flight = SingleFlight(oracle, keep_s=60)
        (only,) = await waiting(oracle, flight, 1)
        only.cancel()
        oracle.failure = OSError("gone")
        oracle.go.set()
        await asyncio.sleep(0.01)
        oracle.failure = None
        assert await flight() == 2
        assert not reported

    asyncio.run(test())
