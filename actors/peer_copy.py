"""Experts from other hosts, for a host whose node lacks the model's folder.

Asks who is ready, connects to one of them, and copies expert by expert. One that is lost, stuck or sends what is
wrong is not asked again; one that can't give an expert is asked for the others. Where nobody is left it waits as
long as other hosts are loading, and gives up with what each of them said.
"""

from __future__ import annotations

import json
import socket
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final, TypeVar

import structlog
from pydantic import ValidationError

from actors import json_stream
from actors.blob import receive_blob, receive_hashed
from actors.blob_server import OUTLINE
from actors.handshake import dial_to_copy
from actors.json_stream import RefusedError
from actors.stored_expert import CopiedCheckpoint, StoredExpert
from actors.streams import open_stream
from cluster.errors import CheckpointError, ProtocolError
from cluster.expert_names import ExpertLayout
from cluster.messages import HostAddress, HostSpec, MoeLayer, Outline, Sources

log = structlog.get_logger()
T = TypeVar("T")

# config.json and a line for every layer.
_MOST_OUTLINE_BYTES: Final = 1 << 24


class NoSourceError(CheckpointError):
    """No other host gives what is needed; the message says why each one does not."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a copy waits, in seconds."""

    answer_s: float = 30.0
    """For a peer to connect, or to send the next piece."""
    nobody_s: float = 5.0
    """For a source, where no host is ready or loading that could be one: a lost one may be starting again."""
    loading_s: float = 600.0
    """For a source, while other hosts are loading."""
    poll_s: float = 0.5


class PeerCopy:
    """Copies experts of one model for one host. Used by one thread."""

    def __init__(
        self,
        spec: HostSpec,
        key: bytes,
        sources: Callable[[], Sources],
        patience: Patience | None = None,
        copied_from: list[str] | None = None,
    ) -> None:
        """Hosts that gave an expert are added to `copied_from`, in order and once each."""
        self._spec, self._key, self._sources = spec, key, sources
        self._patience = patience or Patience()
        self._peer: tuple[HostAddress, socket.socket] | None = None
        self._lost: dict[HostAddress, str] = {}
        self._copied_from = copied_from if copied_from is not None else []

    def outline(self) -> Outline:
        """What the model is. NoSourceError if nobody says."""

        def ask(address: HostAddress, sock: socket.socket) -> Outline:
            json_stream.send(sock, {"ask": "outline"})
            text = receive_hashed(sock, _MOST_OUTLINE_BYTES, lambda size: memoryview(bytearray(size)))
            try:
                return OUTLINE.validate_json(bytes(text))
            except ValidationError as error:
                raise ProtocolError(f"what came is no outline of a model: {error}") from error

        return self._from_any(ask)

    def expert(self, layer: MoeLayer, expert: int) -> StoredExpert:
        """One expert, whole. NoSourceError if nobody gives it."""

        def ask(address: HostAddress, sock: socket.socket) -> StoredExpert:
            json_stream.send(sock, {"ask": "blob", "layer": layer.index, "expert": expert})
            name = f"expert {expert} of layer {layer.index} from host {address.host_id}"
            stored = receive_blob(sock, layer, name)
            self._gave(address)
            return stored

        return self._from_any(ask)

    def version(self, blob: str, most: int) -> bytes:
        """A blob of the store of versions, of `most` so many bytes, proved by its digest. NoSourceError if nobody
        gives it.
        """

        def ask(address: HostAddress, sock: socket.socket) -> bytes:
            json_stream.send(sock, {"ask": "version", "blob": blob})
            data = bytes(receive_hashed(sock, most, lambda size: memoryview(bytearray(size))))
            if sha256(data).hexdigest() != blob:
                raise ProtocolError(f"what came is not blob {blob[:12]}")
            self._gave(address)
            return data

        return self._from_any(ask)

    def close(self) -> None:
        """Drop the connection."""
        if self._peer is not None:
            self._peer[1].close()
            self._peer = None

    def _gave(self, address: HostAddress) -> None:
        if address.host_id not in self._copied_from:
            self._copied_from.append(address.host_id)

    def _from_any(self, ask: Callable[[HostAddress, socket.socket], T]) -> T:
        """The first good answer; NoSourceError if there is none."""
        refused: dict[HostAddress, str] = {}
        began, alone_since = time.monotonic(), None
        candidates = [self._peer[0]] if self._peer else []
        while True:
            for address in candidates:
                try:
                    return ask(address, self._connected(address))
                except RefusedError as error:
                    refused[address] = error.message
                except (OSError, ProtocolError) as error:
                    self._lose(address, error)
            now = time.monotonic()
            try:
                sources = self._sources()
            except Exception as error:
                # The controller may be on its way back; who is loading is not known meanwhile.
                log.warning("no sources known", host=self._spec.host_id, reason=str(error))
                sources, loading = Sources((), ()), True
            else:
                loading = bool(sources.loading)
            candidates = [a for a in self._in_turn(sources) if a not in self._lost and a not in refused]
            if candidates:
                continue
            alone_since = None if loading else now if alone_since is None else alone_since
            if now - began > self._patience.loading_s or (
                alone_since is not None and now - alone_since >= self._patience.nobody_s
            ):
                raise NoSourceError(_nobody({**self._lost, **refused}, sources))
            time.sleep(self._patience.poll_s)

    def _connected(self, address: HostAddress) -> socket.socket:
        """A greeted connection; RefusedError does not come out of here, for it would be for good."""
        if self._peer is not None and self._peer[0] == address:
            return self._peer[1]
        self.close()
        local = address.node_id == self._spec.node_id
        if not local and not address.tcp:
            raise ProtocolError("listens on its own node only")
        sock = open_stream(address, local, self._patience.answer_s)
        try:
            sock.settimeout(self._patience.answer_s)
            host_id = dial_to_copy(sock, self._key, self._spec.model)
            if host_id != address.host_id:
                raise ProtocolError(f"host {host_id} answers in its place")
        except RefusedError as error:
            sock.close()
            raise ProtocolError(error.message, error.hint) from error
        except BaseException:
            sock.close()
            raise
        self._peer = address, sock
        return sock

    def _lose(self, address: HostAddress, error: Exception) -> None:
        self.close()
        reason = error.message if isinstance(error, ProtocolError) else str(error) or type(error).__name__
        self._lost[address] = reason
        log.warning("no copy from this host", host=self._spec.host_id, peer=address.host_id, reason=reason)

    def _in_turn(self, sources: Sources) -> list[HostAddress]:
        """Those of the own node first, and each host the others in an order of its own, to spread the load."""

        def order(address: HostAddress) -> tuple[bool, int]:
            lot = zlib.crc32(f"{self._spec.host_id} {address.host_id}".encode())
            return address.node_id != self._spec.node_id, lot

        return sorted(sources.ready, key=order)


@contextmanager
def copied_checkpoint(copy: PeerCopy, spec: HostSpec) -> Iterator[tuple[CopiedCheckpoint, Outline]]:
    """The model as other hosts give it, for as long as the block lasts: config.json in a folder, experts as asked.

    Raises NoSourceError if nobody gives them.
    """
    with closing(copy), tempfile.TemporaryDirectory(prefix="expertmesh-") as temporary:
        outline = copy.outline()
        # Its name is in errors.
        folder = Path(temporary) / Path(spec.model_path).name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(outline.config)
        layers = {layer.index: layer for layer in outline.layers}
        yield (
            CopiedCheckpoint(
                path=folder,
                config=json.loads(outline.config),
                tensors={},
                layouts={
                    layer.index: ExpertLayout(
                        layer.index, layer.num_experts, False, layer.expert_parameters, {}
                    )
                    for layer in outline.layers
                },
                digest=spec.model,
                fetch=lambda layer, expert: copy.expert(layers[layer], expert),
                dtypes=outline.dtypes,
            ),
            outline,
        )


def _nobody(reasons: dict[HostAddress, str], sources: Sources) -> str:
    said = ", ".join(f"{address.host_id}: {reason}" for address, reason in reasons.items())
    if sources.loading:
        return f"{', '.join(sources.loading)} did not finish loading in time" + (f" ({said})" if said else "")
    return (
        f"no other host gives its experts ({said})" if said else "no other host is ready to give its experts"
    )
