"""vLLM's scheduler, which ends the requests that an outage of experts hit, and forgets what they computed.

Nothing that such a step computed may be used again: neither its tokens, nor its key-value blocks, which vLLM
offers to other requests with the same prefix, in the same step even.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import structlog
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import RequestStatus

from actors import engine_plugin
from actors.outages import DEGRADED, MANIFEST, UNAVAILABLE, manifest_of
from actors.pinning import salted_anew

log = structlog.get_logger()


class MeshScheduler(Scheduler):
    """For engines whose experts live in a mesh."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._degraded: dict[str, str] = {}
        engine_plugin.go_on_with = self.go_on_with

    def go_on_with(self, continued: Mapping[str, str]) -> None:
        """Have running requests go on with other versions: by manifest, the one that takes its place.

        Called between two steps, when nothing that they computed is kept any more.
        """
        for request in self.requests.values():
            manifest, params = continued.get(manifest_of(request)), request.sampling_params
            if manifest is not None and params is not None and params.extra_args is not None:
                # The model runner has the same parameters.
                params.extra_args[MANIFEST] = manifest
                request.cache_salt = salted_anew(request.cache_salt, manifest)
                request.block_hashes = []
                request.update_block_hashes()

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        hit = engine_plugin.outages.take()
        if not hit.failed and not hit.degraded and not self._degraded:
            return super().update_from_output(scheduler_output, model_runner_output)
        scheduled = scheduler_output.num_scheduled_tokens
        failed = self._spoil(hit.failed, scheduled)
        # What a degraded request computes later rests on what it computed then.
        still = {name: reason for name, reason in self._degraded.items() if name in scheduled}
        self._degraded |= self._spoil(hit.degraded | still, scheduled)
        # Before the step's tokens are handed out: a request that has ended gets none of them.
        ended = self.finish_requests(failed, RequestStatus.FINISHED_ERROR) if failed else []
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for request in ended:
            log.warning("request ended: expert unavailable", request=request.request_id)
            outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(
                EngineCoreOutput(
                    request_id=request.request_id,
                    new_token_ids=[],
                    finish_reason=request.get_finished_reason(),
                    stop_reason=UNAVAILABLE + failed[request.request_id],
                    events=request.take_events(),
                    trace_headers=request.trace_headers,
                )
            )
        if self._degraded:
            self._mark(output for of_client in outputs.values() for output in of_client.outputs)
        return outputs

    def _spoil(self, hit: dict[str, str], scheduled: dict[str, int]) -> dict[str, str]:
        """Forget the blocks that this step computed for these requests; they, and those that used them."""
        hit = {name: reason for name, reason in hit.items() if name in self.requests}
        spoilt: set[int] = set()
        waiting = list(hit)
        while waiting:
            name = waiting.pop()
            before = self.requests[name].num_computed_tokens - scheduled.get(name, 0)
            first = max(before, 0) // self.block_size
            fresh = {block for group in self.kv_cache_manager.get_block_ids(name) for block in group[first:]}
            spoilt |= fresh
            for other in scheduled.keys() - hit.keys():
                if other in self.requests and any(
                    not fresh.isdisjoint(group) for group in self.kv_cache_manager.get_block_ids(other)
                ):
                    hit[other] = hit[name]
                    waiting.append(other)
        if spoilt:
            self.kv_cache_manager.evict_blocks(spoilt)
        return hit

    def _mark(self, outputs: Iterable[EngineCoreOutput]) -> None:
        for output in outputs:
            if output.finished and (reason := self._degraded.pop(output.request_id, None)):
                output.kv_transfer_params = {**(output.kv_transfer_params or {}), DEGRADED: reason}
        # Of requests that ended without an output, aborted ones, nothing may be kept.
        self._degraded = {name: why for name, why in self._degraded.items() if name in self.requests}
