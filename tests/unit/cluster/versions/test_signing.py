"""Signatures: whose a version is, and that nothing else passes for it."""

from __future__ import annotations

import sys
import uuid
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from cluster.errors import VersionError
from cluster.versions.collect import collect
from cluster.versions.manifest import Manifest
from cluster.versions.signing import is_signed, sign_manifest, signature_name, verify_manifest
from cluster.versions.store import Store


def key_pair(folder: Path, name: str, password: str | None = None) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    how = (
        serialization.BestAvailableEncryption(password.encode()) if password else serialization.NoEncryption()
    )
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, how)
    )
    public.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return private, public


@pytest.fixture
def store() -> Store:
    return Store(f"memory://{uuid.uuid4().hex}")


def test_a_version_is_its_signer_s_and_nobody_else_s(store: Store, tmp_path: Path) -> None:
    (mine, my_public), (theirs, their_public) = key_pair(tmp_path, "mine"), key_pair(tmp_path, "theirs")
    digest, other = (store.manifests.put(Manifest("m", {0: {0: text}})) for text in "ab")
    with pytest.raises(VersionError, match=f"version {digest[:12]} is not signed"):
        verify_manifest(store, digest, my_public)
    sign_manifest(store, digest, mine)
    assert is_signed(store, digest) and not is_signed(store, other)
    verify_manifest(store, digest, my_public)
    with pytest.raises(VersionError, match=r"is not .*theirs\.pub's"):
        verify_manifest(store, digest, their_public)

    # A good signature of one version is none of another.
    store.files.renew(signature_name(other), store.files.read(signature_name(digest)))
    with pytest.raises(VersionError, match=f"the signature of version {other[:12]} is not"):
        verify_manifest(store, other, my_public)

    sign_manifest(store, digest, theirs)
    verify_manifest(store, digest, their_public)
    with pytest.raises(VersionError, match=r"is not .*mine\.pub's"):
        verify_manifest(store, digest, my_public)

    collect(store, {other}, history=1, min_age_s=-10)
    assert store.files.names("signatures") == [signature_name(other)]


def test_a_signature_that_was_changed_is_none(store: Store, tmp_path: Path) -> None:
    private, public = key_pair(tmp_path, "mine")
    digest = store.manifests.put(Manifest("m", {0: {0: "a"}}))
    sign_manifest(store, digest, private)
    good = store.files.read(signature_name(digest))
    for wrong in (
        b"",
        b"{}",
        b"null",
        b"no JSON",
        good[:-20],
        good.replace(b'"sig":"ME', b'"sig":"MF'),
        good[::-1],
    ):
        assert wrong != good
        store.files.renew(signature_name(digest), wrong)
        with pytest.raises(VersionError, match="the signature of version"):
            verify_manifest(store, digest, public)


def test_keys_that_will_not_do_are_said(store: Store, tmp_path: Path) -> None:
    digest = store.manifests.put(Manifest("m"))
    locked, public = key_pair(tmp_path, "locked", "secret")
    for key, password in ((tmp_path / "absent", None), (public, None), (locked, None), (locked, "wrong")):
        with pytest.raises(VersionError, match="can't sign"):
            sign_manifest(store, digest, key, password)
    assert not is_signed(store, digest)
    sign_manifest(store, digest, locked, "secret")
    verify_manifest(store, digest, public)
    for key, words in ((tmp_path / "absent", "there is no key"), (locked, "the signature of version")):
        with pytest.raises(VersionError, match=words):
            verify_manifest(store, digest, key)
    with pytest.raises(VersionError, match="has no manifests/"):
        sign_manifest(store, "f" * 64, locked, "secret")


def test_without_the_library_it_is_said_what_to_install(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    digest = store.manifests.put(Manifest("m"))
    for call in (sign_manifest, verify_manifest):
        with pytest.raises(VersionError, match="model-signing, which is not installed") as caught:
            call(store, digest, tmp_path / "key")
        assert "expertmesh[signing]" in caught.value.hint
