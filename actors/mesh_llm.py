"""vLLM's asynchronous engine client, which tells a request that an outage of experts ended from a broken engine."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from vllm.exceptions import RetryableRequestError
from vllm.outputs import RequestOutput
from vllm.v1.engine.async_llm import AsyncLLM

from actors.outages import DEGRADED, UNAVAILABLE
from actors.pinning import PinnedInputs, Pins


class MeshLLM(AsyncLLM):
    """`generate` raises vLLM's error for 503 where the scheduler ended a request for want of an expert.

    `degraded` has the reason of requests whose answer was computed without one, for `actors.degraded` to tell.
    """

    degraded: dict[str, str]

    def pin(self, pins: Pins) -> None:
        """Have every request name its version from now on."""
        self.input_processor: Any = PinnedInputs(self.input_processor, pins)

    async def generate(self, *args: Any, **kwargs: Any) -> AsyncGenerator[RequestOutput, None]:
        """As vLLM's."""
        # Closed at once if the caller leaves or an error is raised here: vLLM then ends the request's work.
        async with aclosing(super().generate(*args, **kwargs)) as outputs:
            async for output in outputs:
                if output.finished:
                    self._look_at(output)
                yield output

    def _look_at(self, output: RequestOutput) -> None:
        for answer in output.outputs:
            if isinstance(answer.stop_reason, str) and answer.stop_reason.startswith(UNAVAILABLE):
                raise RetryableRequestError(
                    f"{answer.stop_reason.removeprefix(UNAVAILABLE)}; the mesh is being repaired, try again"
                )
        if output.kv_transfer_params and DEGRADED in output.kv_transfer_params:
            self.degraded[output.request_id] = output.kv_transfer_params.pop(DEGRADED)
