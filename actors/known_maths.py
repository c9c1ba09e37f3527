"""What was found out about a model's experts, kept on disk for the hosts that start later.

Finding out means importing transformers and building the model without weights: 2 of the 5 s of processor time that a
host takes to start, on cores that may be busy serving while it takes a lost one's place.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import structlog

from cluster.cache_folder import cache_folder

log = structlog.get_logger()

# Of what is kept; another one where the facts or the way to find them change.
_FORMAT = 1
Facts = Mapping[int, dict[str, Any]]
"""Layer index → the fields of `actors.expert_maths.ExpertMaths`."""


def known_facts(digest: str) -> Facts:
    """What is known of the checkpoint of this digest; nothing of most."""
    try:
        document = json.loads(_file(digest).read_text())
        return {int(layer): dict(facts) for layer, facts in document.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        log.warning("what was known of a model's experts can't be read", reason=str(error))
        return {}


def remember_facts(digest: str, facts: Facts) -> None:
    """Keep them, whole or not at all. Where they can't be kept they are found out again."""
    file = _file(digest)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, fresh = tempfile.mkstemp(dir=file.parent)
        with os.fdopen(descriptor, "w") as stream:
            json.dump(facts, stream)
        Path(fresh).replace(file)
    except OSError as error:
        log.warning("what is known of a model's experts can't be kept", reason=str(error))


@cache
def _transformers() -> str:
    return version("transformers")


def _file(digest: str) -> Path:
    return cache_folder() / "maths" / f"{digest}-{_transformers()}-{_FORMAT}.json"
