"""The store of versions on a server that speaks S3: the same promises as on a disk, and a model's life in it."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.config import load_config
from cluster.errors import VersionError
from cluster.versions.aliases import Move
from cluster.versions.collect import collect
from cluster.versions.files import Files
from cluster.versions.publish import publish, publish_base
from cluster.versions.store import Store
from tests.integration.s3_server import s3_server
from tests.store_contract import OpenFiles, RacingContract, StoreContract
from tests.unit.cluster.versions import tiny

# Larger ones are uploaded in parts, at the end of which the condition is looked at.
LARGE_BYTES = 101 << 20


@pytest.fixture(scope="module")
def options() -> Iterator[dict[str, Any]]:
    with s3_server() as url:
        yield {
            "endpoint_url": url,
            "key": "k",
            "secret": "s",
            "client_kwargs": {"region_name": "eu-central-1"},
        }


@pytest.fixture
def bucket(options: dict[str, Any]) -> str:
    import s3fs

    name = f"models-{uuid.uuid4().hex}"
    s3fs.S3FileSystem(**options).mkdir(name)
    return name


class TestOnS3(StoreContract, RacingContract):
    @pytest.fixture
    def open_files(self, options: dict[str, Any], bucket: str) -> OpenFiles:
        # Each a client of its own, with connections of its own.
        return lambda: Files(f"s3://{bucket}/mixtral", skip_instance_cache=True, **options)

    def test_what_is_uploaded_in_parts_is_written_once_as_well(self, open_files: OpenFiles) -> None:
        files = open_files()
        assert files.create("large", bytes(LARGE_BYTES)) and not open_files().create(
            "large", bytes(LARGE_BYTES + 1)
        )
        assert files.size("large") == LARGE_BYTES


def test_versions_come_and_go(options: dict[str, Any], bucket: str, tmp_path: Path) -> None:
    file = tmp_path / "expertmesh.yaml"
    file.write_text(f"versions: {{store: 's3://{bucket}/m', options: {json.dumps(options)}}}")
    config = load_config(file, {}, {}).config.versions
    checkpoint = tiny.base(tmp_path)
    store = Store(config.url(checkpoint.digest), config.options)
    base = publish_base(store, checkpoint)
    store.aliases.move("production", Move(1, base, 0.0))
    first = publish(
        store, checkpoint, tiny.changes(checkpoint, tmp_path / "a.safetensors", [(0, 1)]), parent=base
    )
    second = publish(
        store, checkpoint, tiny.changes(checkpoint, tmp_path / "b.safetensors", [(1, 2)]), parent=first.digest
    )
    assert (second.new_blobs, second.reused_blobs, second.changed) == (1, 1, {1: (2,)})
    store.aliases.move("production", Move(2, second.digest, 0.0))

    other = Store(config.url(checkpoint.digest), {**config.options, "skip_instance_cache": True})
    assert other.find("production") == second.digest
    manifest = other.manifests.get(second.digest)
    assert other.missing(manifest) == () and all(map(other.blobs.get, manifest.blobs))

    assert collect(other, history=1, min_age_s=600).bytes == 0
    later = time.time() + 1000
    went = collect(other, history=1, min_age_s=600, now=later)
    assert sorted(went.manifests) == sorted([base, first.digest]) and went.blobs == ()
    assert store.manifests.all() == [second.digest] and store.missing(manifest) == ()

    blob = manifest.experts[1][2]
    name = f"blobs/{blob[:2]}/{blob}"
    good = store.files.read(name)
    store.files.renew(name, good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(VersionError, match=f"blob {blob[:12]} of s3://.* is damaged"):
        other.blobs.get(blob)
    other.blobs.put(good)
    assert store.blobs.get(blob) == good


def test_a_server_that_ignores_the_condition_is_refused(
    options: dict[str, Any], bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    real = s3fs.S3FileSystem._call_s3

    async def careless(self: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("IfNoneMatch", None)
        return await real(self, method, *args, **kwargs)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", careless)
    store = Store(f"s3://{bucket}/m", {**options, "skip_instance_cache": True})
    with pytest.raises(VersionError, match="lets a name be written twice"):
        store.aliases.move("production", Move(1, "m", 0.0))
    assert store.aliases.names() == []


def test_what_is_wrong_with_a_server_is_one_message(options: dict[str, Any], tmp_path: Path) -> None:
    absent = Store("s3://no-such-bucket/m", options)
    checkpoint = tiny.base(tmp_path)
    with pytest.raises(VersionError, match="can't be written to s3://no-such-bucket/m"):
        publish_base(absent, checkpoint)
    with pytest.raises(VersionError, match="has no manifests/ab"):
        absent.manifests.get("ab")
    nobody = {
        **options,
        "endpoint_url": "http://127.0.0.1:9",
        "config_kwargs": {"retries": {"max_attempts": 0}},
    }
    for call in (
        lambda: Store("s3://b/m", nobody).aliases.names(),
        lambda: publish_base(Store("s3://b/m", nobody), checkpoint),
    ):
        with pytest.raises(VersionError, match="s3://b/m: "):
            call()
