"""`expertmesh chaos`: what is refused before anything starts; and signals reach the server's family alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from cluster.errors import ConfigError, ExpertmeshError
from tests.unit.workloads.test_chaos_report import RUN
from workloads.bench import chaos_server, shared_memory
from workloads.bench.chaos_server import MARK, ServerChild, foreign, last_words, steadfast
from workloads.cli import app

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


def test_the_list_names_what_is_shipped() -> None:
    answer = CliRunner().invoke(app, ["chaos", "list"])
    assert answer.exit_code == 0
    assert "kill-host" in answer.output and "SIGSTOP" in answer.output


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "give scenarios by name"),
        (["kill-host", "--all"], "--all has every scenario"),
        (["kill-hots"], "no scenario 'kill-hots'"),
        (["kill-host", "--plot", "/nowhere/x.png"], "no such folder"),
        (["kill-host", "--json", "/nowhere/x.json", "--no-plot"], "no such folder"),
    ],
)
def test_mistakes_are_told_before_anything_starts(arguments: list[str], problem: str) -> None:
    answer = CliRunner().invoke(app, ["chaos", "run", *arguments, "--model", "/no/model"])
    assert isinstance(answer.exception, ConfigError) and problem in str(answer.exception)


def test_two_files_of_one_name(tmp_path: Path) -> None:
    text = "description: d\nevents: [{action: kill, host: any, at: 1}]\n"
    (tmp_path / "kill-host.yaml").write_text(text)
    answer = CliRunner().invoke(app, ["chaos", "run", "kill-host", str(tmp_path / "kill-host.yaml")])
    assert isinstance(answer.exception, ConfigError) and "two scenarios" in str(answer.exception)


def test_a_scenario_that_this_machine_can_not_run_is_refused_by_name_and_left_out_of_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    arguments = ["chaos", "run", "--model", "/no/model"]
    answer = CliRunner().invoke(app, [*arguments, "cut-network"])
    assert isinstance(answer.exception, ConfigError)
    assert "cut-network can't be run here" in answer.exception.message and "root" in answer.exception.hint
    # The others are tried, as far as the model that is not there.
    answer = CliRunner().invoke(app, [*arguments, "--all", "--no-plot"])
    assert isinstance(answer.exception, ExpertmeshError) and "/no/model" in str(answer.exception)


@pytest.mark.parametrize("end", [ExpertmeshError("the third server did not start"), KeyboardInterrupt()])
def test_what_was_measured_is_kept_when_a_later_run_fails(
    end: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "report.json"

    def measure(*arguments: Any) -> None:
        *_, measured, keep = arguments
        measured.runs.append(RUN)
        keep()
        # On disk before anything can end this process: Ray did, without an exception.
        assert len(json.loads(target.read_text())["runs"]) == 1
        raise end

    checkpoint = SimpleNamespace(path=tmp_path, text_config={"vocab_size": 100})
    monkeypatch.setattr("workloads.bench.chaos_run.measure", measure)
    monkeypatch.setattr("workloads.serve.open_model", lambda *_: (checkpoint, "float32", "tiny"))
    arguments = ["kill-host", "slow-host", "--seeds", "2", "--json", str(target), "--no-plot"]
    answer = CliRunner().invoke(app, ["chaos", "run", *arguments])
    assert answer.exit_code != 0
    found = json.loads(target.read_text())
    assert [run["seed"] for run in found["runs"]] == [0] and found["seeds"] == 2
    assert found["ended_early"] == (str(end) or "KeyboardInterrupt")
    # Nothing is said of what did not run.
    assert list(found["scenarios"]) == ["kill-host"]
    assert all(key.startswith("kill-host.") for key in found["bars"])


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> Iterator[ServerChild]:
    """A server child whose process only sleeps."""
    monkeypatch.setattr(chaos_server, "_LINGER_S", 0.5)
    found = ServerChild.__new__(ServerChild)
    found._mark, found._stopped, found._known, found._left = os.urandom(8).hex(), set(), set(), None
    found._nodes = None
    found._shared_memory = shared_memory.names()
    found.process = subprocess.Popen(SLEEP, env={**os.environ, MARK: found._mark})
    yield found
    found.process.kill()
    found.process.wait()


def test_the_end_continues_what_was_stopped_and_kills_what_is_left(child: ServerChild) -> None:
    # A member that ignores Ctrl-C, as one that hangs would, in a session of its own.
    program = "import signal, time; signal.signal(2, signal.SIG_IGN); print(1, flush=True); time.sleep(600)"
    member = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, MARK: child._mark},
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert member.stdout is not None and member.stdout.readline()
    assert {process.pid for process in child.family()} == {child.process.pid, member.pid}
    child.signal(child.process.pid, signal.SIGSTOP)
    left = child.end()
    assert len(left.processes) == 1 and "import signal, time" in left.processes[0]
    assert member.wait(10) == -signal.SIGKILL and child.process.poll() is not None
    assert child.end() is left


def test_a_cluster_ends_after_what_should_have_ended_before_was_looked_for(child: ServerChild) -> None:
    environment = {**os.environ, MARK: child._mark}
    # By their titles: a host that should be gone, and a worker of Ray's that ends with the cluster.
    titles = ("ray::HostActor", "ray::IDLE")
    host, idle = (
        subprocess.Popen([title, *SLEEP[1:]], executable=sys.executable, env=environment) for title in titles
    )

    class Nodes:
        def mend(self) -> None:
            assert host.poll() is idle.poll() is child.process.poll() is None

        def close(self) -> list[str]:
            assert host.wait(10) == -signal.SIGKILL and idle.poll() is None
            idle.kill()
            idle.wait()
            return ["em0br"]

    child._nodes = Nodes()  # type: ignore[assignment]
    left = child.end()
    assert left.networks == ("em0br",)
    assert [name.partition(" ")[0] for name in left.processes] == ["ray::HostActor"]


def test_strangers_and_the_dead_are_not_signalled(child: ServerChild) -> None:
    stranger = subprocess.Popen(SLEEP)
    try:
        with pytest.raises(ExpertmeshError, match="not of this server"):
            child.signal(stranger.pid, signal.SIGKILL)
        assert stranger.poll() is None and psutil.pid_exists(stranger.pid)
    finally:
        stranger.kill()
        stranger.wait()
    with pytest.raises(ExpertmeshError):
        child.signal(stranger.pid, signal.SIGKILL)


def test_a_termination_interrupts_and_a_broken_pipe_does_not_end_the_program() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGPIPE)}
    with pytest.raises(KeyboardInterrupt), steadfast():
        assert signal.getsignal(signal.SIGPIPE) == signal.SIG_IGN
        os.kill(os.getpid(), signal.SIGTERM)
        signal.sigtimedwait([], 5)
    assert before == {number: signal.getsignal(number) for number in before}


def test_an_interrupt_is_taken_where_a_shell_had_it_ignored() -> None:
    """A shell script starts its background jobs so; `serve` is interrupted all the same."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(KeyboardInterrupt), steadfast():
            os.kill(os.getpid(), signal.SIGINT)
            signal.sigtimedwait([], 5)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_last_words_are_the_error() -> None:
    assert last_words("a\nloading\nerror: no room\n  more hosts\n") == "no room\n  more hosts"
    assert last_words("a\nb") == "a\n  b"
    assert last_words("") == "it said nothing"


def test_entries_of_other_programs_processes_are_not_ours() -> None:
    assert foreign("__KMP_REGISTERED_LIB_12_0", {13}) and not foreign("__KMP_REGISTERED_LIB_13_0", {13})
    assert not foreign("psm_12", {13}) and not foreign("__KMP_REGISTERED_LIB_x", {13})
