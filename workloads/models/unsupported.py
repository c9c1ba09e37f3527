"""Architectures that are known not to work, and why: refused before anything is started."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

UNSUPPORTED: Final[Mapping[str, str]] = {
    "gpt_oss": "vLLM gives gpt-oss an expert layer of its own",
    "dbrx": "vLLM gives DBRX an expert layer of its own",
    "llama4": "Llama 4 multiplies router weights into the experts' input",
    "llama4_text": "Llama 4 multiplies router weights into the experts' input",
}
"""Model type → reason. The engine would refuse them as well, but only after a minute of start-up."""
