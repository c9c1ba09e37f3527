"""The scheduler of engines whose experts take a bounded number of rows: ends each step for the bound.

With the policy `defer` it also takes fewer tokens into the step after one that overflowed, so that prompts wait. A
step can't be taken apart per layer: its own rows are all computed, and no token changes.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput

from actors import engine_plugin
from actors.engine_scheduler import MeshScheduler
from cluster.capacity import token_budget


class CapacityScheduler(MeshScheduler):
    """For engines with a capacity; others have `MeshScheduler`, and none of this work."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # None in a rehearsal, which has no experts.
        self._limit = engine_plugin.capacity_limit
        self._largest = self.max_num_scheduled_tokens

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        output = super().schedule(*args, **kwargs)
        if self._limit and self._largest > self.max_num_scheduled_tokens == output.total_num_scheduled_tokens:
            self._limit.stats.overflow_deferred_steps += 1
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        if self._limit is not None:
            share = self._limit.end_step()
            if self._limit.settings.policy == "defer":
                # Also after a step of nothing: a prompt that may not be taken in parts waits for a full budget.
                self.max_num_scheduled_tokens = token_budget(
                    self.max_num_scheduled_tokens,
                    self._largest,
                    scheduled=scheduler_output.total_num_scheduled_tokens,
                    running=len(self.running) * (1 + self.num_spec_tokens),
                    share=share,
                    target=self._limit.settings.target,
                )
        return super().update_from_output(scheduler_output, model_runner_output)
