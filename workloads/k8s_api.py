"""The Kubernetes API with plain documents: get, list, create, and apply as a trial.

For commands that render, compare and look: any kind by its path, and a server-side apply as a trial. The operator,
which watches a few kinds, has the `kubernetes` client (`cluster.kube`). That client's call for any path is another one
in release 37 than in 36, so requests are sent by httpx here, with the same credentials.
"""

from __future__ import annotations

import json
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

import httpx

from cluster.kube_credentials import credentials
from cluster.kube_errors import ConflictError, ForbiddenError, KubeError

Document = dict[str, Any]

# Long enough for an API server that is far away, short enough for somebody who waits.
_ANSWER_S: Final = 20.0
_APPLY: Final = "application/apply-patch+yaml"


class Api(Protocol):
    """What is asked of a cluster; paths are those of its REST API, such as ``/api/v1/nodes``."""

    server: str
    namespace: str
    """Where nothing else is said: that of the context, or of the pod."""

    def get(self, path: str, **query: str) -> Document | None:
        """What is there; None if nothing is. ForbiddenError, or KubeError with what the server says."""

    def create(self, path: str, body: Document, **query: str) -> Document:
        """What the server made of it. ConflictError if that name is taken."""

    def try_apply(self, path: str, body: Document, manager: str) -> Document | None:
        """What would be there after a server-side apply; changes nothing. None if the path does not exist."""


class HttpApi:
    """An API server, asked over HTTP."""

    def __init__(self, server: str, namespace: str, client: httpx.Client) -> None:
        self.server, self.namespace = server, namespace
        self._client = client

    def get(self, path: str, **query: str) -> Document | None:
        return self._answer("GET", path, query)

    def create(self, path: str, body: Document, **query: str) -> Document:
        made = self._answer("POST", path, query, json.dumps(body), "application/json")
        if made is None:
            raise KubeError(f"{self.server} knows no {path}", "see `expertmesh k8s doctor`")
        return made

    def try_apply(self, path: str, body: Document, manager: str) -> Document | None:
        query = {"fieldManager": manager, "force": "true", "dryRun": "All"}
        return self._answer("PATCH", path, query, json.dumps(body), _APPLY)

    def _answer(
        self, method: str, path: str, query: Mapping[str, str], content: str = "", kind: str = ""
    ) -> Document | None:
        try:
            answer = self._client.request(
                method,
                path,
                params=dict(query),
                content=content or None,
                headers={"Content-Type": kind} if kind else {},
            )
        except httpx.HTTPError as error:
            raise KubeError(
                f"the API server at {self.server} does not answer: {error or type(error).__name__}",
                "see `kubectl cluster-info`; --kubeconfig and --context name another cluster",
            ) from error
        return read_answer(self.server, method, path, answer.status_code, answer.content)


def read_answer(server: str, method: str, path: str, status: int, content: bytes) -> Document | None:
    """The document in an answer, None where there is nothing; KubeError in words for any other status but success."""
    try:
        document = json.loads(content)
    except ValueError:
        document = {}
    if 200 <= status < 300 and isinstance(document, dict):
        return document
    said = document.get("message") if isinstance(document, dict) else None
    said = str(said or content[:200].decode("utf-8", "replace") or f"status {status}")
    if status == 404:
        return None
    if status == 401:
        raise KubeError(
            f"{server} does not accept these credentials", "log in again; see `kubectl auth whoami`"
        )
    if status == 403:
        raise ForbiddenError(said, "ask for that permission, or use another --context")
    if status == 409:
        raise ConflictError(said, "look at what is there, and try again")
    raise KubeError(f"{server} answers {status} to {method} {path}: {said}", "see `expertmesh k8s doctor`")


def connect(kubeconfig: Path | None = None, context: str | None = None) -> HttpApi:
    """The cluster of `credentials`; KubeError if there is none."""
    settings, namespace = credentials(kubeconfig, context)
    return HttpApi(settings.host, namespace, _http_client(settings))


def _http_client(settings: Any) -> httpx.Client:
    """A client with the credentials of a `kubernetes.client.Configuration`, asked for anew with every request."""
    if settings.verify_ssl:
        trust = ssl.create_default_context(cafile=settings.ssl_ca_cert or None)
    else:
        trust = ssl.create_default_context()
        trust.check_hostname, trust.verify_mode = False, ssl.CERT_NONE
    if settings.cert_file:
        trust.load_cert_chain(settings.cert_file, settings.key_file or None)
    return httpx.Client(
        base_url=settings.host,
        verify=trust,
        proxy=proxy_for(settings.host, settings.proxy, settings.no_proxy),
        timeout=_ANSWER_S,
        trust_env=False,
        auth=_authorise(settings.auth_settings),
    )


def proxy_for(server: str, proxy: str | None, no_proxy: str | None) -> str | None:
    """The proxy through which a server is asked; None where it is asked itself."""
    host = httpx.URL(server).host
    past = [entry.strip().lstrip(".") for entry in (no_proxy or "").split(",") if entry.strip()]
    bypassed = any(entry in ("*", host) or host.endswith(f".{entry}") for entry in past)
    return None if not proxy or bypassed else proxy


def _authorise(credentials: Callable[[], Mapping[str, Any]]) -> Callable[[httpx.Request], httpx.Request]:
    # A pod's token is renewed every hour, in its file: the configuration reads it again when it is asked.
    def authorised(request: httpx.Request) -> httpx.Request:
        for one in credentials().values():
            if one.get("in") == "header" and one.get("value"):
                request.headers[one["key"]] = one["value"]
        return request

    return authorised
