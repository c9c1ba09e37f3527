"""An operator's changes on a running server: a host joins, experts move, hosts leave; no answer notices."""

from __future__ import annotations

import json
from pathlib import Path

import openai
import pytest

from tests.e2e.asking import PROMPTS, Asking, ask
from tests.e2e.programs import ServerProgram, run, wait_for

pytestmark = pytest.mark.slow


def test_hosts_join_and_leave_and_experts_move_while_requests_run(
    server: ServerProgram, client: openai.OpenAI, tmp_path: Path
) -> None:
    number = iter(range(100))

    def command(*words: str, code: int = 0) -> str:
        done = run(tmp_path / f"command-{next(number)}", *words, "--url", server.url)
        assert done.process.returncode == code, done.err
        return done.out if code == 0 else done.err

    def hosts() -> dict[str, int]:
        told = json.loads(command("status", "--json"))
        return {host["host_id"]: host.get("experts_loaded", 0) for host in told["hosts"]}

    expected = [ask(client, prompt) for prompt in PROMPTS]
    before = hosts()
    with Asking(client, expected) as asking:
        assert "local-2 joined" in command("scale", "local", "3")
        wait_for(lambda: hosts().get("local-2"), 60, "experts on the host that joined")
        wait_for(lambda: sum(hosts().values()) == sum(before.values()), 90, "old copies to go")
        seen = asking.answers
        told = json.loads(command("experts", "--json"))
        proposal = json.loads(command("rebalance", "--dry-run", "--json"))
        assert "local-2 left" in command("scale", "local", "2")
        assert hosts().keys() == before.keys() and sum(hosts().values()) == sum(before.values())
        wait_for(lambda: asking.answers > seen, 60, "answers after the changes")
    assert asking.wrong == []
    assert sum(map(sum, told["chosen"].values())) > 0
    assert set(told["costs"]) == {"local-0", "local-1", "local-2"}
    assert not proposal["made"] and proposal["seconds_now"] > 0

    assert "can't be scaled to 0" in command("scale", "local", "0", code=1)
    assert "there is no host group west" in command("scale", "west", "1", code=1)
    assert "there is no node nowhere" in command("drain", "nowhere", code=1)
    here = json.loads(command("status", "--json"))["hosts"][0]["node_id"]
    assert "can't be drained" in command("drain", here, code=1)
    assert hosts().keys() == before.keys()
