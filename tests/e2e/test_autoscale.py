"""A group that scales itself: a host more while there is work, one fewer when there is none; no answer notices."""

from __future__ import annotations

import json
from pathlib import Path

import openai
import pytest

from tests.e2e.asking import PROMPTS, Asking, ask
from tests.e2e.programs import ServerProgram, free_port, run, settings, wait_for

pytestmark = pytest.mark.slow

GROUP = {
    "name": "local",
    "count": 1,
    "threads": 1,
    # A tiny model's experts keep nobody busy: any work at all is to be too much for one host.
    "autoscale": {
        "min": 1,
        "max": 2,
        "utilisation": 0.001,
        "queue": None,
        "up_cooldown": "1s",
        "down_cooldown": "2s",
    },
}


@pytest.mark.long
def test_a_group_grows_with_its_work_and_shrinks_without(tiny_model: Path, tmp_path: Path) -> None:
    server = ServerProgram(tmp_path / "server", settings(tiny_model, free_port(), hosts=[GROUP]))
    number = iter(range(1000))

    def hosts() -> dict[str, int]:
        done = run(tmp_path / f"status-{next(number)}", "status", "--json", "--url", server.url)
        assert done.process.returncode == 0, done.err
        return {host["host_id"]: host.get("experts_loaded", 0) for host in json.loads(done.out)["hosts"]}

    try:
        server.wait_ready()
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)
        expected = [ask(client, prompt) for prompt in PROMPTS]
        # Even these requests may be work enough for a second host on a slow machine.
        wait_for(lambda: set(hosts()) == {"local-0"}, 150, "one host to be left without load")
        alone = hosts()
        assert set(alone) == {"local-0"}
        with Asking(client, expected) as asking:
            wait_for(lambda: hosts().get("local-1"), 120, "a second host with experts under load")
        assert asking.answers > 0 and asking.wrong == []
        wait_for(lambda: hosts() == alone, 150, "the second host to leave without load")
        assert [ask(client, prompt) for prompt in PROMPTS] == expected
        server.interrupt()
        assert server.wait() == 0, server.err
        server.assert_gone()
    finally:
        server.kill()
