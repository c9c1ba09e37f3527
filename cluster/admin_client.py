"""A mesh's admin API as the operator uses it, over HTTP."""

from __future__ import annotations

from typing import Any, Final, Protocol
from urllib.parse import quote

import httpx
from pydantic import TypeAdapter, ValidationError

from cluster.errors import ExpertmeshError
from cluster.groups_report import DRAINED, GROUPS, Drained, GroupsReport

# A drain plans a placement before it answers.
_ASK_S: Final = 5.0
_PLAN_S: Final = 60.0


class MeshError(ExpertmeshError):
    """The mesh does not answer, or refuses."""


class MeshStartingError(MeshError):
    """Its hosts are still starting, or nothing is deployed there yet."""


class MeshAdmin(Protocol):
    """One mesh. Every call may raise MeshError."""

    def groups(self) -> GroupsReport: ...
    def drain(self, node_id: str, reason: str) -> Drained: ...
    def undrain(self, node_id: str) -> None: ...


class HttpMeshAdmin:
    """At an address such as ``http://10.0.0.7:8081``."""

    def __init__(self, url: str, key: str, client: httpx.Client | None = None) -> None:
        self.url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        # No proxy is asked for what is inside the cluster.
        self._client = client or httpx.Client(trust_env=False)

    def groups(self) -> GroupsReport:
        return self._read(GROUPS, self._ask("GET", "/groups"))

    def drain(self, node_id: str, reason: str) -> Drained:
        path = f"/nodes/{quote(node_id, safe='')}/drain"
        return self._read(DRAINED, self._ask("POST", path, {"reason": reason}, _PLAN_S))

    def undrain(self, node_id: str) -> None:
        self._ask("DELETE", f"/nodes/{quote(node_id, safe='')}/drain")

    def _ask(
        self, method: str, path: str, body: dict[str, Any] | None = None, timeout_s: float = _ASK_S
    ) -> bytes:
        try:
            answer = self._client.request(
                method, self.url + path, json=body, headers=self._headers, timeout=timeout_s
            )
        except httpx.HTTPError as error:
            raise MeshError(
                f"the admin API at {self.url} does not answer: {error}",
                "is admin.port set, and may the operator reach the head pod?",
            ) from error
        if answer.is_success:
            return answer.content
        message, hint = _said(answer)
        if answer.status_code == 409:
            raise MeshStartingError(message, hint)
        if answer.status_code == 401:
            hint = "give the operator EXPERTMESH_ADMIN_KEY, one of the mesh's admin.keys"
        raise MeshError(f"{method} {path}: {message}", hint)

    def _read(self, schema: TypeAdapter[Any], content: bytes) -> Any:
        try:
            return schema.validate_json(content)
        except ValidationError as error:
            raise MeshError(
                f"the admin API at {self.url} answers what this version does not understand: {error}",
                "run the operator and the mesh from the same version",
            ) from error


def _said(answer: httpx.Response) -> tuple[str, str]:
    try:
        error = answer.json()["error"]
        return str(error["message"]), str(error["hint"])
    except (ValueError, KeyError, TypeError):
        return f"status {answer.status_code}", ""
