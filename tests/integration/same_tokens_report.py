"""How close the mesh is to stock vLLM, per architecture: share of equal tokens and mean KL divergence.

Usage: python -m tests.integration.same_tokens_report DTYPE FILE.json [ARCHITECTURE ...]

An architecture is one of the tiny random checkpoints', or `default` for the default model.

The divergence is taken over stock vLLM's ten most likely tokens, at the positions before the first
different token: after it the two answer different texts.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.integration.same_tokens_worker import ENVIRONMENT
from tests.integration.test_same_tokens import SUPPORTED, compare
from tests.integration.vllm_forks import vllm_forks
from tests.tiny_models import make_tiny
from workloads.bench.report import envelope, now
from workloads.models.default_model import default_model


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """Per number of hosts: equal tokens, all tokens, positions with a common prefix, mean KL over those."""
    rows = {}
    for hosts, answers in result["mesh"].items():
        equal = total = 0
        divergences = []
        for index, (stock, mesh) in enumerate(zip(result["stock"], answers, strict=True)):
            equal += sum(a == b for a, b in zip(stock, mesh, strict=True))
            total += len(stock)
            for position, (a, b) in enumerate(zip(stock, mesh, strict=True)):
                p = result["stock_logprobs"][index][position]
                q = result["logprobs"][hosts][index][position]
                common = p.keys() & q.keys()
                divergences.append(sum(math.exp(p[t]) * (p[t] - q[t]) for t in common))
                if a != b:
                    break
        rows[hosts] = {
            "equal": equal,
            "tokens": total,
            "share": equal / total,
            "positions": len(divergences),
            "mean_kl": sum(divergences) / len(divergences),
        }
    return rows


def main() -> None:
    dtype, target, *chosen = sys.argv[1:]
    started_at = now()
    results = []
    with tempfile.TemporaryDirectory() as folder, vllm_forks(ENVIRONMENT) as forks:
        for arch in chosen or SUPPORTED:
            path = default_model() if arch == "default" else make_tiny(arch, Path(folder) / arch, dtype=dtype)
            result = compare(forks, path, dtype)
            for hosts, row in summary(result).items():
                results.append({"architecture": arch, "hosts": int(hosts), "kernel": result["kernel"], **row})
                print(arch, hosts, row, flush=True)
    report = envelope(
        "same tokens", seed=7, started_at=started_at, series={}, bars=[], dtype=dtype, results=results
    )
    Path(target).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
