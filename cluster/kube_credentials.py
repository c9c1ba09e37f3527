"""Whose cluster is meant, and with which credentials: what kubeconfig files and a pod's service account say."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from cluster.kube_errors import KubeError

_IN_POD: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


def credentials(kubeconfig: Path | None = None, context: str | None = None) -> tuple[Any, str]:
    """A `kubernetes.client.Configuration`, and the context's namespace or the pod's own.

    As kubectl would, or as a pod with a service account does where nothing else is named. KubeError if there is
    neither.
    """
    from kubernetes import client, config

    settings = client.Configuration()
    try:
        if in_pod(kubeconfig, context, os.environ):
            config.load_incluster_config(client_configuration=settings)
            return settings, _IN_POD.read_text("utf-8").strip() if _IN_POD.exists() else "default"
        file = str(kubeconfig) if kubeconfig else None
        config.load_kube_config(config_file=file, context=context, client_configuration=settings)
        return settings, _namespace_of(config.list_kube_config_contexts(config_file=file), context)
    except (config.ConfigException, OSError, ValueError) as error:
        raise KubeError(
            f"no cluster is configured here: {(str(error).strip() or type(error).__name__).splitlines()[0]}",
            "give --kubeconfig FILE and --context NAME, set KUBECONFIG, or run this in a pod with a service account",
        ) from error


def in_pod(kubeconfig: Path | None, context: str | None, environ: Mapping[str, str]) -> bool:
    """Whether the cluster is the one around this pod: nothing else is named, and there is one."""
    if kubeconfig is not None or context is not None or environ.get("KUBECONFIG"):
        return False
    return "KUBERNETES_SERVICE_HOST" in environ and not (Path.home() / ".kube" / "config").exists()


def _namespace_of(contexts: tuple[list[dict[str, Any]], dict[str, Any] | None], wanted: str | None) -> str:
    found, active = contexts
    chosen = next((one for one in found if one["name"] == wanted), None) if wanted else active
    return str((chosen or {}).get("context", {}).get("namespace") or "default")
