"""A Ray cluster on this machine whose own autoscaler (the second) starts and ends nodes: Ray's fake provider."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cluster.auth import ray_environment
from cluster.ray_cluster import QUIET
from workloads.bench.ports import free_port
from workloads.bench.process_marks import kill_all, marked

_MARK = "EXPERTMESH_AUTOSCALED"
# The id that Ray's fake provider gives the head.
_HEAD_ID = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"
_START_S = 120.0
_END_S = 20.0
_MEMORY = 80 * 2**20


class AutoscaledCluster:
    """A head without CPUs, and workers with one CPU and the label zone=a or zone=b. `close` must be called."""

    def __init__(self, token: Path, folder: Path, *, idle_s: float, most: int) -> None:
        """A worker that was idle for `idle_s` seconds is ended; there are `most` of each zone."""
        self._folder = folder
        # Unix socket paths are short, so Ray's folder must be as well.
        self._ray = Path(tempfile.mkdtemp(prefix="em", dir="/tmp"))
        self._idle_s, self._most = idle_s, most
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        self.environment = {
            **os.environ,
            **QUIET,
            **ray_environment(token),
            "RAY_TMPDIR": str(self._ray),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_FAKE_CLUSTER": "1",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            _MARK: str(self._ray),
        }

    def start(self) -> None:
        """Returns when the head runs."""
        config = self._folder / "autoscaling.json"
        config.write_text(json.dumps(self._config()))
        arguments = [
            *("start", "--head", "--block", f"--port={self.address.rpartition(':')[2]}", "--num-cpus=0"),
            *("--node-ip-address=127.0.0.1", "--include-dashboard=false"),
            *(f"--object-store-memory={_MEMORY}", f"--autoscaling-config={config}"),
            *(f"--metrics-export-port={free_port()}", f"--dashboard-agent-listen-port={free_port()}"),
        ]
        head = {"RAY_CLOUD_INSTANCE_ID": _HEAD_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD_ID}
        with (self._folder / "head.log").open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-c", "from ray.scripts.scripts import main; main()", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**self.environment, **head},
                start_new_session=True,
            )
        deadline = time.monotonic() + _START_S
        while "Ray runtime started" not in self.log():
            assert process.poll() is None and time.monotonic() < deadline, self.log()
            time.sleep(0.1)

    def log(self) -> str:
        """What the head and the autoscaler said."""
        files = [self._folder / "head.log", *self._ray.glob("session_2*/logs/monitor*")]
        return "\n".join(file.read_text(errors="replace")[-5000:] for file in files if file.is_file())

    def close(self) -> None:
        """End every process of the cluster."""
        kill_all(lambda: marked(_MARK, str(self._ray)), _END_S)
        shutil.rmtree(self._ray, ignore_errors=True)

    def _config(self) -> dict[str, object]:
        worker = {
            "resources": {"CPU": 1, "object_store_memory": _MEMORY},
            "node_config": {},
            "min_workers": 0,
            "max_workers": self._most,
        }
        commands = ("setup", "initialization", "head_setup", "worker_setup")
        return {
            **{f"{name}_commands": [] for name in commands},
            "head_start_ray_commands": [],
            "worker_start_ray_commands": [],
            "file_mounts": {},
            "cluster_synced_files": [],
            "file_mounts_sync_continuously": False,
            "rsync_exclude": [],
            "rsync_filter": [],
            "docker": {},
            "auth": {},
            "cluster_name": "expertmesh-test",
            "max_workers": 2 * self._most,
            "idle_timeout_minutes": self._idle_s / 60,
            "upscaling_speed": 100,
            "provider": {
                # The type "fake_multinode" reads a file that Ray's wheel lacks.
                "type": "external",
                "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
                "disable_node_updaters": True,
                "disable_launch_config_check": True,
                "launch_multiple": True,
                "head_node_id": _HEAD_ID,
                "gcs_address": self.address,
            },
            "available_node_types": {
                "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
                "worker-a": {**worker, "labels": {"zone": "a"}},
                "worker-b": {**worker, "labels": {"zone": "b"}},
            },
            "head_node_type": "ray.head.default",
        }
