"""Which nodes' daemons are gone, found out by connecting to them: Ray itself takes 10 to 50 s to say so.

Only a refused connection counts: the node's kernel answers that nobody listens there any more. A node that is
silent may be cut off, and come back.
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

_PATIENCE_S = 0.2


@dataclass(slots=True)
class Listening:
    """Remembers what it saw of each node id; Ray never uses one again."""

    _seen: set[str] = field(default_factory=set)
    _gone: set[str] = field(default_factory=set)

    def gone(self, addresses: Mapping[str, tuple[str, int]]) -> frozenset[str]:
        """Of these nodes, given by id with the IP address and port of their daemon, those that are gone.

        A node counts only if it could be reached before: what refuses from the first is a firewall. Takes at most
        0.2 s, which is until a node has neither accepted nor refused.
        """
        self._seen &= addresses.keys()
        self._gone &= addresses.keys()
        asked = {node: address for node, address in addresses.items() if node not in self._gone}
        for node, refused in _connect(asked).items():
            if not refused:
                self._seen.add(node)
            elif node in self._seen:
                self._gone.add(node)
        return frozenset(self._gone)


def _connect(addresses: Mapping[str, tuple[str, int]]) -> dict[str, bool]:
    """Per address that answered in time whether it refused; all are tried at once."""
    with contextlib.ExitStack() as stack:
        poll, waiting, answered = select.poll(), {}, {}
        for name, (ip, port) in addresses.items():
            family = socket.AF_INET6 if ":" in ip else socket.AF_INET
            sock = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            sock.setblocking(False)
            try:
                error = sock.connect_ex((ip, port))
            except OSError:
                continue  # a name that can't be resolved says nothing
            if error in (0, errno.ECONNREFUSED):
                answered[name] = error != 0
            elif error == errno.EINPROGRESS:
                waiting[sock.fileno()] = name, sock
                poll.register(sock, select.POLLOUT)
        end = time.monotonic() + _PATIENCE_S
        while waiting and (events := poll.poll(max(0.0, end - time.monotonic()) * 1e3)):
            for descriptor, _ in events:
                name, sock = waiting.pop(descriptor)
                poll.unregister(descriptor)
                error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if error in (0, errno.ECONNREFUSED):
                    answered[name] = error != 0
        return answered
