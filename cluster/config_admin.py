"""The configuration's part on the admin API: where it listens, and who may use it."""

from __future__ import annotations

from pydantic import BaseModel, SecretStr, ValidationInfo, field_validator

from cluster.config_mistakes import BadValue
from cluster.config_values import SECTION, ApiKeys, Name, Port, is_loopback


class AdminConfig(BaseModel):
    """HTTP for those who publish, promote and roll back. Without a ``port`` there is none."""

    model_config = SECTION

    host: Name = "127.0.0.1"
    port: Port | None = None
    keys: ApiKeys = ()

    @field_validator("keys")
    @classmethod
    def _guard_network(cls, keys: tuple[SecretStr, ...], info: ValidationInfo) -> tuple[SecretStr, ...]:
        host = info.data.get("host")
        if host is not None and info.data.get("port") and not keys and not is_loopback(host):
            raise BadValue(
                f"the admin API would be reachable from other machines at {host} without a key",
                "set admin.keys, for example to [env:EXPERTMESH_ADMIN_KEY], or admin.host to 127.0.0.1",
                path=("admin", "host"),
            )
        return keys
