"""vLLM's asynchronous engine client, which tells a request that an outage of experts ended from a broken engine."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from vllm.exceptions import RetryableRequestError, VLLMValidationError
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM

from actors.canary_watch import CanaryWatch
from actors.outages import DEGRADED, UNAVAILABLE
from actors.own_requests import PROBE, REPLAY
from actors.pinning import PinnedInputs, Pins


class MeshLLM(AsyncLLM):
    """`generate` raises vLLM's error for 503 where the scheduler ended a request for want of an expert.

    `degraded` has the reason of requests whose answer was computed without one, for `actors.degraded` to tell.
    """

    degraded: dict[str, str]

    def pin(self, pins: Pins, watch: CanaryWatch) -> None:
        """Have every request name its version from now on, and `watch` be told how it ended."""
        self.input_processor: Any = PinnedInputs(self.input_processor, pins)
        self._pins, self._watch = pins, watch

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """As vLLM's."""
        manifest, metrics = self._pins.current(), None
        try:
            # Closed at once if the caller leaves or an error is raised here: vLLM then ends the request's work.
            async with aclosing(
                super().generate(prompt, sampling_params, request_id, *args, **kwargs)
            ) as outputs:
                async for output in outputs:
                    if output.finished:
                        self._look_at(output)
                        metrics = output.metrics
                    yield output
        except VLLMValidationError:
            raise  # the request's own fault
        except Exception:
            self._watch.answered(request_id, manifest, failed=True)
            raise
        if metrics is not None and not request_id.startswith((REPLAY, PROBE)):
            self._watch.answered(request_id, manifest, failed=False, metrics=metrics)

    async def nats(self, tokens: list[int]) -> float:
        """How little it expects a text: minus the mean logarithm of the chances that it gives each next token."""
        sampling = SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=0, output_kind=RequestOutputKind.FINAL_ONLY
        )
        found: list[float] = []
        async for output in self.generate(
            {"prompt_token_ids": tokens}, sampling, f"{REPLAY}{os.urandom(8).hex()}"
        ):
            chances = output.prompt_logprobs or []
            found = [of[token].logprob for token, of in zip(tokens, chances, strict=True) if of]
        return -sum(found) / len(found)

    def _look_at(self, output: RequestOutput) -> None:
        for answer in output.outputs:
            if isinstance(answer.stop_reason, str) and answer.stop_reason.startswith(UNAVAILABLE):
                raise RetryableRequestError(
                    f"{answer.stop_reason.removeprefix(UNAVAILABLE)}; the mesh is being repaired, try again"
                )
        if output.kv_transfer_params and DEGRADED in output.kv_transfer_params:
            self.degraded[output.request_id] = output.kv_transfer_params.pop(DEGRADED)
