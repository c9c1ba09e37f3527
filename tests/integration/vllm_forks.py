"""Jobs that need vLLM in a process of their own, forked from one that has imported it: a third of their time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path


class VllmForks:
    """Runs `main` of a module of the tests with arguments, again and again."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self._process, self._folder = process, folder

    def run(
        self, module: str, *arguments: str, timeout_s: float = 1200.0
    ) -> subprocess.CompletedProcess[str]:
        """As `python -m module` with these arguments would run."""
        assert self._process.stdin is not None and self._process.stdout is not None
        out, err = self._folder / "out", self._folder / "err"
        job = {
            "module": module,
            "arguments": arguments,
            "out": str(out),
            "err": str(err),
            "timeout": timeout_s,
        }
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        code = json.loads(self._process.stdout.readline())["code"]
        return subprocess.CompletedProcess([module, *arguments], code, out.read_text(), err.read_text())


@contextmanager
def vllm_forks(environment: Mapping[str, str]) -> Iterator[VllmForks]:
    """The process for a block."""
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.vllm_forks"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **environment},
            text=True,
        )
        try:
            yield VllmForks(process, Path(folder))
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(60)


def _work() -> None:
    for module in (
        "vllm.v1.engine.llm_engine",
        "actors.engine_plugin",
        "actors.expert_host",
        "workloads.deploy",
    ):
        import_module(module)
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            _be(job)
        _, status = os.waitpid(child, 0)
        print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), flush=True)


def _be(job: dict[str, object]) -> None:
    """Run a job in this process, which ends with it."""
    code = 1
    try:
        for number, file in ((0, os.devnull), (1, str(job["out"])), (2, str(job["err"]))):
            os.dup2(os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600), number)
        # A job that hangs is ended by the kernel: nobody else waits for it.
        import signal

        signal.alarm(int(float(str(job["timeout"]))))
        arguments = job["arguments"]
        assert isinstance(arguments, list)
        sys.argv = [str(job["module"]), *map(str, arguments)]
        import_module(str(job["module"])).main()
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _work()
