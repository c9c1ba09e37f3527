"""A running server with a store of versions, as tests use it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from cluster.live_versions import HEADER
from cluster.version_changes import VersionsStatus
from tests.e2e.asking import PROMPTS, ask
from tests.e2e.controller_client import ControllerClient
from tests.e2e.programs import ServerProgram, free_port, run, settings, wait_for

LONG = 480
"""Tokens of a long answer."""
_SLOW_MS = 20.0
"""Of each layer, while something is done in the middle of one."""


class Mesh:
    """A server with a store of versions, and the commands on it."""

    def __init__(self, model: Path, folder: Path, **sections: Any) -> None:
        self.model, self._folder, self._number = model, folder, 0
        self.store = folder / "store"
        versions = {"store": str(self.store), "keep_warm": "1h", **sections.pop("versions", {})}
        admin = {"port": free_port(), "keys": ["hush"]}
        config = settings(model, free_port(), versions=versions, admin=admin, **sections)
        environment = {"EXPERTMESH_FAILPOINTS": "1"}
        self.server = ServerProgram(folder / "server", config, environment)
        self.admin = httpx.Client(
            base_url=f"http://127.0.0.1:{admin['port']}", headers={"Authorization": "Bearer hush"}, timeout=60
        )
        self.client = openai.OpenAI(
            base_url=f"{self.server.url}/v1", api_key="none", max_retries=0, timeout=120
        )

    def command(self, *words: str, code: int = 0) -> Any:
        """What it prints as JSON; the error with another code."""
        self._number += 1
        words = (*words, "--config", str(self.server.config), *(("--json",) if code == 0 else ()))
        done = run(self._folder / f"command-{self._number}", "versions", *words)
        assert done.process.returncode == code, done.err
        return json.loads(done.out) if code == 0 else done.err

    def live(self, *words: str, code: int = 0) -> Any:
        """The same of the running server."""
        return self.command(*words, "--url", self.server.url, code=code)

    def published(self, file: Path, parent: str = "") -> str:
        return str(self.command("publish", str(file), *(("--parent", parent) if parent else ()))["digest"])

    def answer(self, **more: Any) -> tuple[str, httpx.Response]:
        """The manifest that an answer names in its header, and the answer."""
        body = {"model": "tiny", "prompt": PROMPTS[0], "max_tokens": 2, "temperature": 0, **more}
        answer = httpx.post(f"{self.server.url}/v1/completions", json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        return answer.headers[HEADER], answer

    def answers(self) -> list[list[int]]:
        return [ask(self.client, prompt) for prompt in PROMPTS]

    def stream(self) -> tuple[str, list[int]]:
        """A long answer: its manifest and tokens."""
        # By chance with a seed: a random model's likeliest tokens soon repeat themselves, whatever its version.
        body = {
            "model": "tiny",
            "prompt": PROMPTS[0],
            "max_tokens": LONG,
            "temperature": 1,
            "seed": 7,
            "ignore_eos": True,
        }
        tokens: list[int] = []
        with httpx.stream(
            "POST",
            f"{self.server.url}/v1/completions",
            json={**body, "stream": True, "return_token_ids": True},
            timeout=120,
        ) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    tokens += json.loads(line[6:])["choices"][0].get("token_ids") or []
                    self.streamed = len(tokens)
            return response.headers[HEADER], tokens

    streamed = 0

    def while_streaming(self, do: Callable[[], object]) -> tuple[str, list[int]]:
        """A long answer in the middle of which something is done."""
        assert self.controller is not None
        found: list[tuple[str, list[int]]] = []
        self.streamed = 0
        thread = threading.Thread(target=lambda: found.append(self.stream()))
        # A busy machine does the other thing slowly, and is not to have the answer finished by then.
        self.controller.slow_down("local-0", _SLOW_MS)
        thread.start()
        wait_for(lambda: self.streamed > 3, 60, "the first tokens")
        do()
        assert self.streamed < LONG, "the answer was over before"
        self.controller.slow_down("local-0", 0)
        thread.join(120)
        return found[0]

    def promote(self, version: str, *, goes_on: bool = False) -> None:
        """As the command, which takes as long to start as a long answer does to end."""
        assert self.controller is not None
        assert self.controller.ask("promote", version, "me", "a test", goes_on).manifest == version

    def rollback(self) -> None:
        assert self.controller is not None
        self.controller.ask("rollback", "me", "a test")

    def status(self) -> VersionsStatus:
        found: VersionsStatus = self.ask_controller("versions")
        return found

    def stage(self, version: str) -> None:
        self.ask_controller("stage", version)
        wait_for(lambda: version in self.status().live, 60, "a version to be loaded")

    controller: ControllerClient | None = None

    def ask_controller(self, method: str, *arguments: object) -> Any:
        assert self.controller is not None
        return self.controller.ask(method, *arguments)


@contextmanager
def running_mesh(model: Path, folder: Path, **sections: Any) -> Iterator[Mesh]:
    """Within the block a mesh that is ready; at its end Ctrl-C must end it and leave nothing."""
    mesh = Mesh(model, folder, **sections)
    try:
        mesh.server.wait_ready()
        with ControllerClient(mesh.server.config, mesh.server.url) as controller:
            mesh.controller = controller
            yield mesh
        mesh.server.interrupt()
        assert mesh.server.wait() == 0, mesh.server.err
        assert "Traceback" not in mesh.server.err
        with pytest.raises(httpx.ConnectError):
            mesh.admin.get("/health")
        mesh.server.assert_gone()
    finally:
        mesh.server.kill()
