"""Signatures of versions: who holds a private key says that a manifest is theirs, who has the public key can tell.

A manifest names all its blobs by their sha256, so its signature covers the whole version. Signatures are those of the
OpenSSF's model signing (a sigstore bundle over an in-toto statement) with keys on elliptic curves, so its own tools can
check them as well.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Final

from cluster.errors import VersionError
from cluster.versions.store import Store

_FOLDER: Final = "signatures"
# What the signed folder and the file in it are called: both are part of what is signed.
_SIGNED: Final = "version"
_FILE: Final = "manifest.json"


def signature_name(digest: str) -> str:
    """The file in the store that holds a version's signature."""
    return f"{_FOLDER}/{digest}"


def is_signed(store: Store, digest: str) -> bool:
    """Whether there is a signature; not whether it is right."""
    return store.files.has(signature_name(digest))


def sign_manifest(store: Store, digest: str, private_key: Path, password: str | None = None) -> None:
    """Sign a version with an elliptic-curve key in PEM, in place of any earlier signature.

    VersionError if there is no such version, or the key can't be used.
    """
    signing = _library("signing")
    # Declared as a text there, and handed on to where bytes are wanted.
    secret = password.encode() if password else None
    with _written(store.manifests.read(digest)) as (folder, signature):
        try:
            signing.Config().use_elliptic_key_signer(private_key=private_key, password=secret).sign(
                folder, signature
            )
        except (OSError, ValueError, TypeError) as error:
            raise VersionError(
                f"{private_key} can't sign: {error}",
                "give a private key as `openssl ecparam -name prime256v1 -genkey -noout` makes it",
            ) from error
        store.files.renew(signature_name(digest), signature.read_bytes())


def verify_manifest(store: Store, digest: str, public_key: Path) -> None:
    """VersionError if the version is not signed, or not with this key's private one."""
    verifying = _library("verifying")
    if not is_signed(store, digest):
        raise VersionError(
            f"version {digest[:12]} is not signed, and {public_key} must have signed it",
            "sign it: `expertmesh versions sign`, or take versions.public_key out of the configuration",
        )
    if not public_key.is_file():
        raise VersionError(f"there is no key {public_key}", "see versions.public_key in the configuration")
    with _written(store.manifests.read(digest)) as (folder, signature):
        signature.write_bytes(store.files.read(signature_name(digest)))
        try:
            verifying.Config().use_elliptic_key_verifier(public_key=public_key).verify(folder, signature)
        except Exception as error:
            # The library raises whatever its parsers raise, too; nothing but its silence is a yes.
            said = str(error) or type(error).__name__
            raise VersionError(
                f"the signature of version {digest[:12]} is not {public_key}'s: {said}",
                "do not serve it unless you know who published it; sign it again if that was you",
            ) from error


def _library(name: str) -> ModuleType:
    # Here and not above: it takes a second, and few need it.
    try:
        import model_signing
    except ImportError as error:
        raise VersionError(
            "signatures need the package model-signing, which is not installed",
            "pip install 'expertmesh[signing]'",
        ) from error
    return {"signing": model_signing.signing, "verifying": model_signing.verifying}[name]


@contextmanager
def _written(manifest: bytes) -> Iterator[tuple[Path, Path]]:
    """A folder with the manifest, as the library signs folders, and a path for the signature beside it."""
    with tempfile.TemporaryDirectory(prefix="expertmesh-version-") as made:
        folder = Path(made) / _SIGNED
        folder.mkdir()
        (folder / _FILE).write_bytes(manifest)
        yield folder, Path(made) / "signature"
