"""An expert host over a tiny checkpoint: loads, serves through a dispatcher, reports, says why it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from actors.expert_host import ExpertHost
from actors.expert_weights import build_layer
from cluster.checkpoint import Checkpoint
from cluster.errors import CheckpointError, ExpertmeshError, HostError
from tests.tiny_models import make_tiny
from tests.unit.actors.tiny_host import KEY, LOAD_TIMEOUT_S, batch, dispatcher, running, spec


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(make_tiny("mixtral", tmp_path_factory.mktemp("mixtral")))


@pytest.mark.parametrize("node_id", ["here", "elsewhere"], ids=["shared-memory", "tcp"])
def test_two_hosts_give_what_all_experts_in_one_place_give(checkpoint: Checkpoint, node_id: str) -> None:
    first, second = (0, 2, 5), (1, 3, 4, 6, 7)
    specs = [
        spec(checkpoint, first, tcp_ip="127.0.0.1"),
        spec(checkpoint, second, host_id="local-1", tcp_ip="127.0.0.1"),
    ]
    owners = [0 if expert in first else 1 for expert in range(8)]
    x, weights, ids = batch(checkpoint, 11)
    with running(*specs) as hosts:
        addresses = [host.wait_ready(LOAD_TIMEOUT_S) for host in hosts]
        with dispatcher(checkpoint, addresses, owners, node_id) as dispatch:
            for layer in checkpoint.moe_layers:
                out = torch.empty_like(x)
                dispatch(layer.index, x, weights, ids, out)
                whole = build_layer(checkpoint, layer.index, range(8), torch.float32, kernel="grouped-mm")
                expected = torch.empty_like(x)
                whole.compute(x, ids, weights, expected)
                torch.testing.assert_close(out, expected)
            reports = [host.report() for host in hosts]
    layers = len(checkpoint.moe_layers)
    assert [report.experts_loaded for report in reports] == [3 * layers, 5 * layers]
    size = checkpoint.moe_layers[0].expert_parameters * 4
    assert [report.weight_bytes for report in reports] == [3 * layers * size, 5 * layers * size]
    for report, address in zip(reports, addresses, strict=True):
        assert report.address == address
        assert report.kernel == "grouped-mm"
        assert (report.connections, report.dispatches) == (1, layers)
        assert 0 < report.rows <= 11 * layers
        assert report.compute_seconds > 0 and report.load_seconds > 0


def test_progress_counts_the_layers(checkpoint: Checkpoint) -> None:
    host = ExpertHost(spec(checkpoint, (0,)), KEY)
    before = host.progress()
    assert (before.layers_loaded, before.layers, before.ready, before.error) == (0, 2, False, "")
    with pytest.raises(TimeoutError, match="did not finish loading within 0 s"):
        host.report()
    with running(host.spec) as (started,):
        address = started.wait_ready(LOAD_TIMEOUT_S)
        after = started.progress()
    assert (after.layers_loaded, after.layers, after.ready, after.error) == (2, 2, True, "")
    assert (address.host_id, address.unix, address.tcp) == ("local-0", host.spec.unix, "")


def test_another_checkpoint_than_the_engine_s_is_refused(checkpoint: Checkpoint) -> None:
    with running(spec(checkpoint, (0,), model="ef" * 32)) as (host,):
        with pytest.raises(CheckpointError, match="not the engine's checkpoint"):
            host.wait_ready(LOAD_TIMEOUT_S)
        state = host.progress()
        assert not state.ready
        assert "put the same folder on every node" in state.error
        with pytest.raises(CheckpointError):
            host.report()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_path": "/nonexistent"}, "no such folder"),
        ({"kernel": "abacus"}, "no kernel of the name 'abacus'"),
        ({"experts": {17: (0,)}}, "layer 17 has no routed experts"),
        ({"experts": {0: (0, 8)}}, "layer 0 has no expert 8"),
        # Not an error that anyone foresaw: it must end the wait all the same.
        ({"dtype": "float13"}, "local-0 could not load: AttributeError"),
    ],
)
def test_a_load_that_fails_ends_the_wait_with_the_reason(
    checkpoint: Checkpoint, changes: dict[str, object], words: str
) -> None:
    with running(spec(checkpoint, (0,), **changes)) as (host,):
        with pytest.raises(ExpertmeshError) as error:
            host.wait_ready(LOAD_TIMEOUT_S)
        assert words in str(error.value)
        assert words in host.progress().error


def test_two_hosts_of_one_name_cannot_run(checkpoint: Checkpoint) -> None:
    one = spec(checkpoint, (0,))
    with running(one) as (first,):
        first.wait_ready(LOAD_TIMEOUT_S)
        with running(one) as (second,), pytest.raises(HostError, match="can't be taken"):
            second.wait_ready(LOAD_TIMEOUT_S)


def test_a_shard_cut_short_is_found_before_it_serves(checkpoint: Checkpoint, tmp_path: Path) -> None:
    for file in checkpoint.path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    whole = next(tmp_path.glob("*.safetensors"))
    whole.write_bytes(whole.read_bytes()[:-64])
    with (
        running(spec(checkpoint, (0,), model_path=str(tmp_path))) as (host,),
        pytest.raises(CheckpointError, match=whole.name),
    ):
        host.wait_ready(LOAD_TIMEOUT_S)
