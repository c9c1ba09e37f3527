"""Hosts without the model's folder, over real sockets: copied experts compute the same, or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest
import torch

from actors import bf16_kernel, host_server
from actors.expert_host import ExpertHost
from actors.json_stream import RefusedError
from actors.peer_copy import NoSourceError, Patience, PeerCopy
from actors.vllm_cpu_kernel import vllm_cpu_ops
from cluster.checkpoint import Checkpoint
from cluster.errors import CheckpointError
from cluster.messages import HostAddress, HostSpec, MoeLayer, Sources
from tests.tiny_models import make_tiny
from tests.unit.actors.bad_wire import BadWire
from tests.unit.actors.tiny_host import KEY, LOAD_TIMEOUT_S, batch, dispatcher, running, spec

QUICK = Patience(answer_s=5.0, nobody_s=0.1, loading_s=20.0, poll_s=0.02)
ALL = tuple(range(8))
ABSENT = "/absent/model"
Asked = Callable[[], Sources]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


def checkpoint_of(arch: str, tiny: Path) -> Checkpoint:
    folder = tiny / arch
    return Checkpoint.open(folder if folder.exists() else make_tiny(arch, folder))


@pytest.fixture
def checkpoint(tiny: Path) -> Checkpoint:
    return checkpoint_of("mixtral", tiny)


@pytest.fixture
def large(tiny: Path) -> Checkpoint:
    """Experts of 3 MiB: several pieces each, and more than sockets hold."""
    folder = tiny / "large"
    changes = {"hidden_size": 512, "intermediate_size": 512}
    return Checkpoint.open(folder if folder.exists() else make_tiny("mixtral", folder, **changes))


def ready(*addresses: HostAddress) -> Asked:
    return lambda: Sources(addresses, ())


@contextmanager
def serving(checkpoint: Checkpoint, *names: str, **changes: object) -> Iterator[list[HostAddress]]:
    """Hosts with the folder, all experts each, on the node "there"."""
    specs = [
        spec(checkpoint, ALL, host_id=name, node_id="there", tcp_ip="127.0.0.1", **changes) for name in names
    ]
    with running(*specs) as hosts:
        yield [host.wait_ready(LOAD_TIMEOUT_S) for host in hosts]


def without_folder(checkpoint: Checkpoint, local: tuple[int, ...] = ALL, **changes: object) -> HostSpec:
    options = {"host_id": "new", "model_path": ABSENT, "tcp_ip": "127.0.0.1", **changes}
    return spec(checkpoint, local, **options)


@contextmanager
def copying(wanted: HostSpec, sources: Asked, **options: object) -> Iterator[ExpertHost]:
    with running(wanted, sources=sources, **{"patience": QUICK, **options}) as (host,):
        yield host


def outputs(checkpoint: Checkpoint, address: HostAddress, local: tuple[int, ...] = ALL) -> list[torch.Tensor]:
    """What the host answers to the same rows for every layer; rows want its experts only."""
    x, weights, ids = batch(checkpoint, 11)
    ids = torch.tensor(local, dtype=torch.int32)[ids.long() % len(local)]
    outs = []
    with dispatcher(checkpoint, [address], [0] * 8) as dispatch:
        for layer in checkpoint.moe_layers:
            outs.append(torch.empty_like(x))
            dispatch(layer.index, x, weights, ids, outs[-1])
    return outs


def same(ones: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


@pytest.mark.parametrize("node_id", ["there", "elsewhere"], ids=["unix", "tcp"])
@pytest.mark.parametrize("kernel", ["auto", "grouped-mm"])
@pytest.mark.parametrize("arch", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "granitemoe"])
def test_a_copied_host_answers_bit_for_bit_as_one_with_the_folder(
    arch: str, kernel: str, node_id: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    checkpoint = checkpoint_of(arch, tiny)
    # Of the same experts in the same order, which is that of the sums.
    twin = spec(checkpoint, (6, 1, 4), host_id="twin", kernel=kernel)
    wanted = without_folder(checkpoint, (6, 1, 4), kernel=kernel, node_id=node_id)
    with (
        serving(checkpoint, "old", kernel=kernel) as (old,),
        running(twin) as (read,),
        copying(wanted, ready(old)) as host,
    ):
        new = host.wait_ready(LOAD_TIMEOUT_S)
        expected = outputs(checkpoint, read.wait_ready(LOAD_TIMEOUT_S), (6, 1, 4))
        assert expected[0].abs().max() > 0.01
        assert same(outputs(checkpoint, new, (6, 1, 4)), expected)
        assert host.report().copied_from == ("old",)
        assert read.report().copied_from == ()
        assert "expertmesh-blob" not in Path("/proc/self/maps").read_text()
    assert list(tmp_path.glob("expertmesh-*")) == []


@pytest.mark.parametrize("kernel", ["grouped-mm", "bf16-weights"])
def test_a_copied_host_gives_what_it_holds_to_the_next(kernel: str, tmp_path: Path) -> None:
    if kernel == "bf16-weights" and bf16_kernel.kernel() is None:
        pytest.skip("no C++ compiler")
    checkpoint = Checkpoint.open(make_tiny("mixtral", tmp_path / "model", dtype="bfloat16"))
    with ExitStack() as stack:
        with serving(checkpoint, "old", kernel=kernel) as (old,):
            expected = outputs(checkpoint, old, (2, 5))
            new = without_folder(checkpoint, (5, 2), kernel=kernel)
            host = stack.enter_context(copying(new, ready(old)))
            second = host.wait_ready(LOAD_TIMEOUT_S)
        # Nobody has the folder any more.
        third = without_folder(checkpoint, (2, 5), host_id="third", kernel=kernel)
        with copying(third, ready(second)) as host:
            assert same(outputs(checkpoint, host.wait_ready(LOAD_TIMEOUT_S), (2, 5)), expected)
            assert host.report().copied_from == ("new",)
            assert host.report().kernel == kernel
        with (
            copying(without_folder(checkpoint, (3,), host_id="third"), ready(second)) as host,
            pytest.raises(
                CheckpointError, match="neither has the model's folder nor holds expert 3 of layer 0"
            ),
        ):
            host.wait_ready(LOAD_TIMEOUT_S)


@pytest.mark.skipif(vllm_cpu_ops() is None, reason="no CPU build of vLLM")
def test_packed_experts_are_refused_and_the_next_host_is_asked(checkpoint: Checkpoint) -> None:
    with ExitStack() as stack:
        (old,) = stack.enter_context(serving(checkpoint, "old"))
        packed = without_folder(checkpoint, host_id="packed", kernel="vllm-cpu")
        second = stack.enter_context(copying(packed, ready(old))).wait_ready(LOAD_TIMEOUT_S)
        with copying(without_folder(checkpoint), ready(second, old)) as host:
            host.wait_ready(LOAD_TIMEOUT_S)
            assert host.report().copied_from == ("old",)
        with (
            copying(without_folder(checkpoint), ready(second)) as host,
            pytest.raises(
                CheckpointError,
                match="packed: has no folder of the model, and its kernel keeps no plain matrices",
            ),
        ):
            host.wait_ready(LOAD_TIMEOUT_S)


@pytest.mark.parametrize("fault", ["flip", "cut", "stall"])
def test_a_host_lost_or_wrong_in_the_middle_of_a_copy_is_replaced_by_another(
    large: Checkpoint, fault: str
) -> None:
    with serving(large, "bad", "good") as (bad, good):
        size = large.expert_bytes(0, "float32")
        # In the middle of the third expert.
        with BadWire(bad, fault, 2 * size + size // 2) as wire:
            left = [wire.address]

            def sources() -> Sources:
                """The good one is there only when the bad one has failed."""
                return Sources((wire.address,), ()) if wire.passed <= 2 * size else Sources((*left, good), ())

            patience = Patience(answer_s=0.5, nobody_s=5.0, poll_s=0.02)
            with copying(without_folder(large), sources, patience=patience) as host:
                new = host.wait_ready(LOAD_TIMEOUT_S)
                assert host.report().copied_from == ("bad", "good")
                assert same(outputs(large, new), outputs(large, good))
                # No more of the bad one than what was on its way.
                assert wire.passed < 4 * size


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("flip", "bad: what came does not have the sha256 that it was sent with"),
        ("cut", "bad: the peer closed in the middle"),
        ("stall", "bad: timed out"),
    ],
)
def test_without_another_host_the_load_fails_with_its_reason(
    large: Checkpoint, fault: str, words: str
) -> None:
    with (
        serving(large, "bad") as (bad,),
        BadWire(bad, fault, 2_000_000) as wire,
        copying(
            without_folder(large), ready(wire.address), patience=Patience(answer_s=0.5, nobody_s=0.1)
        ) as host,
    ):
        with pytest.raises(CheckpointError, match=words):
            host.wait_ready(LOAD_TIMEOUT_S)
        assert not host.progress().ready
        # The repair shows the first line.
        first = host.progress().error.splitlines()[0]
        assert words in first and f"no such folder: {ABSENT}" in first and "host new on " in first


def test_a_wrong_token_gives_nothing(checkpoint: Checkpoint) -> None:
    with (
        serving(checkpoint, "old") as (old,),
        copying(without_folder(checkpoint), ready(old), key=b"x" * 32) as host,
        pytest.raises(CheckpointError, match="could not prove the data-plane token"),
    ):
        host.wait_ready(LOAD_TIMEOUT_S)


def test_a_host_proves_the_token_before_it_is_asked(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The same the other way round, in the host's eyes: a copier of another key is refused there, too."""
    import socket

    from actors import json_stream

    with serving(checkpoint, "old") as (old,):
        ip, _, port = old.tcp.rpartition(":")
        with socket.create_connection((ip, int(port)), 5) as sock:
            json_stream.send(sock, {"protocol": 1, "nonce": "00"})
            json_stream.receive(sock)
            json_stream.send(sock, {"proof": "00" * 32, "model": checkpoint.digest, "copy": True})
            with pytest.raises(RefusedError, match="the copier could not prove"):
                json_stream.receive(sock)


def test_another_model_is_not_copied(checkpoint: Checkpoint, tmp_path: Path) -> None:
    other = Checkpoint.open(make_tiny("mixtral", tmp_path, seed=1))
    with (
        serving(other, "old") as (old,),
        copying(without_folder(checkpoint), ready(old)) as host,
        pytest.raises(CheckpointError, match=rf"holds model {other.digest[:12]}"),
    ):
        host.wait_ready(LOAD_TIMEOUT_S)


def test_a_folder_with_another_model_is_not_used(checkpoint: Checkpoint, tmp_path: Path) -> None:
    make_tiny("mixtral", tmp_path, seed=1)
    with (
        serving(checkpoint, "old") as (old,),
        copying(without_folder(checkpoint, model_path=str(tmp_path)), ready(old)) as host,
    ):
        assert same(outputs(checkpoint, host.wait_ready(LOAD_TIMEOUT_S)), outputs(checkpoint, old))
        assert host.report().copied_from == ("old",)


def test_a_file_that_was_changed_since_is_not_given(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_tiny("mixtral", tmp_path / "model"))
    with serving(checkpoint, "old") as (old,):
        other = make_tiny("mixtral", tmp_path / "other", seed=1)
        (other / "model.safetensors").rename(checkpoint.path / "model.safetensors")
        with (
            copying(without_folder(checkpoint), ready(old)) as host,
            pytest.raises(CheckpointError, match=r"model\.safetensors was changed since it was loaded"),
        ):
            host.wait_ready(LOAD_TIMEOUT_S)


def test_what_a_host_does_not_have_is_refused_in_words_and_the_rest_is_given(checkpoint: Checkpoint) -> None:
    with serving(checkpoint, "old") as (old,):
        asked = []
        copy = PeerCopy(without_folder(checkpoint), KEY, lambda: asked.append(1) or ready(old)(), QUICK)
        with closing(copy):
            layer = checkpoint.moe_layers[0]
            for absent, words in (
                ((layer, 8), "layer 0 has no expert 8"),
                ((layer, -1), "layer 0 has no expert -1"),
                ((MoeLayer(17, 8, layer.expert_parameters), 0), "layer 17 has no routed experts"),
            ):
                with pytest.raises(NoSourceError, match=words):
                    copy.expert(*absent)
            before = len(asked)
            assert copy.expert(layer, 7).parts["down"].shape == (128, 96)
            assert len(asked) == before, "the connection was lost"


def test_a_host_on_another_node_that_listens_on_its_own_is_passed_over(checkpoint: Checkpoint) -> None:
    one = spec(checkpoint, ALL, host_id="old", node_id="there")
    with (
        running(one) as (old,),
        copying(without_folder(checkpoint), ready(old.wait_ready(LOAD_TIMEOUT_S))) as host,
        pytest.raises(CheckpointError, match="old: listens on its own node only"),
    ):
        host.wait_ready(LOAD_TIMEOUT_S)


def test_without_any_host_the_error_names_folder_node_and_way_out(checkpoint: Checkpoint) -> None:
    with (
        copying(without_folder(checkpoint), ready()) as host,
        pytest.raises(
            CheckpointError, match=f"no such folder: {ABSENT}, and no other host is ready"
        ) as error,
    ):
        host.wait_ready(LOAD_TIMEOUT_S)
    assert "put the model's folder there" in error.value.hint


def test_a_host_waits_while_others_load_and_while_nobody_can_say(checkpoint: Checkpoint) -> None:
    answers: list[Sources | Exception] = [TimeoutError("no answer"), Sources((), ("old",))]
    with serving(checkpoint, "old") as (old,):
        told = iter([*answers * 10])

        def sources() -> Sources:
            answer = next(told, Sources((old,), ()))
            if isinstance(answer, Exception):
                raise answer
            return answer

        patience = Patience(nobody_s=0.0, poll_s=0.01)
        with copying(without_folder(checkpoint), sources, patience=patience) as host:
            host.wait_ready(LOAD_TIMEOUT_S)
            assert next(told, None) is None


def test_a_host_that_never_finishes_loading_is_not_waited_for_without_end(checkpoint: Checkpoint) -> None:
    patience = Patience(loading_s=0.1, poll_s=0.02)
    with (
        copying(without_folder(checkpoint), lambda: Sources((), ("old",)), patience=patience) as host,
        pytest.raises(CheckpointError, match="old did not finish loading in time"),
    ):
        host.wait_ready(LOAD_TIMEOUT_S)


def test_a_copy_waits_for_no_kernel_and_counts_as_no_engine(checkpoint: Checkpoint) -> None:
    """Nor does a kernel wait for a copy: experts are read and hashed outside the lock that kernels run under."""
    with running(spec(checkpoint, ALL, host_id="old")) as (old,):
        sources = ready(old.wait_ready(LOAD_TIMEOUT_S))
        copy = PeerCopy(without_folder(checkpoint, node_id="here"), KEY, sources, QUICK)
        with closing(copy), host_server._KERNEL_LOCK:
            assert copy.outline().layers == checkpoint.moe_layers
            assert copy.expert(checkpoint.moe_layers[0], 3).parts.keys() == {"gate", "up", "down"}
            assert old.report().connections == 0
