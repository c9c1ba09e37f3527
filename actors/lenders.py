"""The hosts on an engine's GPU, asked for the memory of their experts. The other side is `actors.blob_server`."""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import NamedTuple

import structlog

from actors import json_stream
from actors.handshake import dial_to_copy
from actors.slot_format import SlotFormat
from actors.streams import open_stream
from cluster.errors import ProtocolError
from cluster.messages import HostAddress

log = structlog.get_logger()


class Source(NamedTuple):
    """Whose memory it is: a host that was started again has other memory."""

    host_id: str
    pid: int

    @classmethod
    def of(cls, address: HostAddress) -> Source:
        return cls(address.host_id, address.pid)


class _Lender(NamedTuple):
    sock: socket.socket
    forms: dict[int, SlotFormat]
    """By layer."""


class Lenders:
    """Asked one after the other, by one thread, with little patience: the engine waits."""

    def __init__(self, gpu: str, layers: tuple[int, ...], *, model: str, key: bytes) -> None:
        """`gpu`: as `actors.cuda_memory.gpu_name` has it."""
        self._gpu, self._layers, self._model, self._key = gpu, layers, model, key
        self._patience_s = 0.0
        self._addresses: dict[Source, HostAddress] = {}
        self._open: dict[Source, _Lender | None] = {}
        # Hosts that have nothing on this GPU, and will not have anything.
        self._barren: set[Source] = set()

    def begin(self, addresses: list[HostAddress], patience_s: float) -> None:
        """Ask these from now on, each answer for so long at most; those that did not answer before are asked again."""
        self.end()
        self._addresses = {Source.of(address): address for address in addresses}
        self._barren &= self._addresses.keys()
        self._patience_s = patience_s

    def end(self) -> None:
        """Drop the connections."""
        for lender in self._open.values():
            if lender is not None:
                lender.sock.close()
        self._open = {}

    def may_lend(self, source: Source) -> bool:
        """Whether it is not known to have nothing here."""
        return source in self._addresses and source not in self._barren

    def form(self, source: Source, layer: int) -> SlotFormat | None:
        """How the host keeps a layer's experts; None if it lends none."""
        if not self.may_lend(source):
            return None
        if source not in self._open:
            self._open[source] = self._ask(self._addresses[source])
        lender = self._open[source]
        return None if lender is None else lender.forms.get(layer)

    def borrow(self, source: Source, layer: int, expert: int) -> int:
        """A descriptor of an expert's memory, to be closed; -1 if the host does not give it."""
        lender = self._open.get(source)
        if lender is None:
            return -1
        try:
            json_stream.send(
                lender.sock, {"ask": "memory", "layer": layer, "expert": expert, "gpu": self._gpu}
            )
            return json_stream.receive(lender.sock)[1]
        except json_stream.RefusedError as error:
            log.warning("expert not lent", host=source.host_id, layer=layer, expert=expert, reason=str(error))
        except (OSError, ProtocolError) as error:
            log.warning("host lends nothing", host=source.host_id, reason=str(error))
            lender.sock.close()
            self._open[source] = None
        return -1

    def _ask(self, address: HostAddress) -> _Lender | None:
        try:
            sock = open_stream(address, True, self._patience_s)
        except OSError as error:
            log.warning("host lends nothing", host=address.host_id, reason=str(error))
            return None
        try:
            sock.settimeout(self._patience_s)
            dial_to_copy(sock, self._key, self._model)
            forms: dict[int, SlotFormat] = {}
            for layer in self._layers:
                json_stream.send(sock, {"ask": "memory", "layer": layer, "gpu": self._gpu})
                with suppress(json_stream.RefusedError):
                    forms[layer] = SlotFormat(**json_stream.receive(sock)[0]["format"])
            if forms:
                return _Lender(sock, forms)
            self._barren.add(Source.of(address))
        except (OSError, ProtocolError) as error:
            log.warning("host lends nothing", host=address.host_id, reason=str(error))
        sock.close()
        return None
