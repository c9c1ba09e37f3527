"""A training job as Ray Train runs it: workers on any nodes, with a part of each step's rows each.

A worker that is lost, or more workers that become possible, end the group: Ray Train begins it again from the last
state that was put down. A job that is lost as a whole goes on the same way when it is begun again under its name.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed

from actors import gentle_start
from actors.expert_training import Trained
from actors.training_job import JobFiles, Progress, Saved, from_bytes, to_bytes
from actors.training_run import Pace, Worker, run_steps, whole
from cluster import niceness
from cluster.errors import ExpertmeshError, LearningError
from cluster.messages import StoreAddress
from cluster.versions.files import Files

# One file, or one of each worker.
_STATE: Final = "state"
_POLL_S: Final = 0.25
# Others wait for one that pauses; that it is lost they hear at once, since its connections end.
_COLLECTIVE_S: Final = 7 * 86400
# Ray Train's own: a worker that ended is noticed after half a second instead of two. Its metrics and its watch for
# nodes that are taken away by the cloud cost a process or cores, and nobody reads them.
_ENVIRONMENT: Final = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
}


@dataclass(frozen=True, slots=True)
class Workers:
    """Who trains."""

    least: int = 1
    most: int = 1
    cpus: float = 0.01
    """That each keeps from others in Ray's books; next to nothing by default, since they take what nobody uses."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Of the nodes that they may be on."""
    max_failures: int = 3
    """Losses of workers after which a job is given up."""
    resize_s: float = 60.0
    """How often is looked whether more are possible."""


def run_on_ray(
    name: str, state: StoreAddress, workers: Workers, progress: Callable[[Progress], None]
) -> Saved:
    """Run a job that was put down, from its last state on; its state after its last step.

    `progress` is called several times a second; what it raises ends the wait, not the job, which ends with this
    process's connection to Ray. LearningError if the job can't be done, ExpertmeshError if it is lost too often.
    """
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    files = JobFiles(Files(state.url, **state.options), name)
    ended: list[Any] = []
    # Not in the main thread, where Ray Train would take Ctrl-C for itself.
    thread = threading.Thread(target=lambda: ended.append(_fit(name, state, workers)), daemon=True)
    ours = _coordinator() is None
    thread.start()
    while thread.is_alive():
        thread.join(_POLL_S)
        if (now := files.progress()) is not None:
            progress(now)
    if ours and (left := _coordinator()) is not None:
        import ray

        ray.kill(left)
    result = ended[0] if ended else RuntimeError("the thread that waited for it ended")
    if isinstance(result, Exception):
        said = str(getattr(result, "worker_failures", "") or result).strip().splitlines()
        raise ExpertmeshError(
            f"the training {name} was lost: {said[-1] if said else type(result).__name__}",
            "begun again it goes on where it was; the logs are under /tmp/ray/session_latest/logs",
        ) from result
    if result.return_value is not None:
        raise LearningError(*result.return_value)
    return _state(result.checkpoint)


def _state(checkpoint: Any) -> Saved:
    """What one worker put down, or all of them together."""
    with checkpoint.as_directory() as folder:
        return whole([from_bytes(file.read_bytes()) for file in sorted(Path(folder).glob(f"{_STATE}*"))])


def _coordinator() -> Any:
    """The actor by which Ray Train asks for nodes, if there is one: nobody ends it, in a cluster that goes on."""
    import ray

    try:
        return ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
    except ValueError:
        return None


def _fit(name: str, state: StoreAddress, workers: Workers) -> Any:
    """What Ray Train says in the end, or the exception that it raised."""
    from ray import train as ray_train
    from ray.train.torch import TorchConfig
    from ray.train.torch import TorchTrainer as RayTorchTrainer

    # Their types are those of Ray Train's first version.
    train: Any = ray_train
    TorchTrainer: Any = RayTorchTrainer
    file_system, root = Files(state.url, **state.options).arrow()
    job = JobFiles(Files(state.url, **state.options), name).job()
    most = min(workers.most, job.rows.rows)
    try:
        return TorchTrainer(
            _work,
            train_loop_config={"name": name, "state": state},
            torch_config=TorchConfig(backend="gloo", timeout_s=_COLLECTIVE_S),
            scaling_config=train.ScalingConfig(
                num_workers=most if workers.least >= most else (workers.least, most),
                resources_per_worker={"CPU": workers.cpus},
                label_selector=dict(workers.labels) or None,
                elastic_resize_monitor_interval_s=workers.resize_s,
            ),
            run_config=train.RunConfig(
                name=name,
                storage_path=f"{root}/training",
                storage_filesystem=file_system,
                failure_config=train.FailureConfig(max_failures=workers.max_failures),
                checkpoint_config=train.CheckpointConfig(num_to_keep=2),
                # Read by OpenMP when it is loaded, which is before any code of ours runs.
                worker_runtime_env={"env_vars": {"OMP_NUM_THREADS": str(job.threads)}},
                logging_config=train.LoggingConfig(log_level="ERROR"),
            ),
        ).fit()
    except Exception as error:
        return error


def _work(config: dict[str, Any]) -> tuple[str, str] | None:
    """One worker, in its process; why the job can't be done, if it can't: another attempt would end the same way."""
    from ray import train

    context = train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    files = JobFiles(Files(config["state"].url, **config["state"].options), config["name"])
    job = files.job()
    if job.gentle:
        niceness.yield_cores()
        gentle_start.give_way()
    checkpoint = train.get_checkpoint()
    saved = None if checkpoint is None else _state(checkpoint)
    together = Worker(rank, workers, _added_up if workers > 1 else lambda tensors: None)

    def keep(saved: Saved) -> None:
        kept = None
        if rank == 0 or together.apart(job):
            folder = Path(tempfile.mkdtemp(prefix="expertmesh-training-"))
            (folder / f"{_STATE}-{rank}").write_bytes(to_bytes(saved))
            kept = train.Checkpoint.from_directory(folder)
        train.report(
            {"step": saved["told"][-1][0], "loss": saved["told"][-1][1]},
            checkpoint=kept,
            checkpoint_upload_mode=train.CheckpointUploadMode.ASYNC,
        )

    pace: Callable[[Trained], None] = (
        Pace(job, files, os.getpid(), workers) if rank == 0 else lambda trained: None
    )
    try:
        run_steps(job, files, saved, keep, worker=together, each=pace)
    except LearningError as error:
        return error.message, error.hint
    return None


def _added_up(tensors: Sequence[torch.Tensor]) -> None:
    """Add what all workers have, in one message."""
    if not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    torch.distributed.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
