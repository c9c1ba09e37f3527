"""The engine's compiled code, kept from one start to the next by vLLM's ahead-of-time compilation.

What is kept is the whole of it, the model as it was traced included: tracing anew takes a second per layer, even where
Inductor finds every kernel in its cache. vLLM itself compares the sources that were traced, and compiles again where
one of them has changed.
"""

from __future__ import annotations

import hashlib
from typing import Any

from actors.native_library import processor


def processor_digest() -> str:
    """Of what this machine's processor can do; code that was compiled for another may not run here.

    vLLM's key of the code does not have it.
    """
    return hashlib.sha256(processor().encode()).hexdigest()[:16]


def make_loadable() -> None:
    """Have vLLM load what it saved on CPUs too.

    There vLLM 0.32 hands the model to Inductor as a whole. What is loaded is then a plain function, without the method
    that vLLM calls to load the parts of a model that it divided: it takes the error for a file that can't be loaded,
    and compiles again at every start.
    """
    import torch  # rehearsals ask for the processor without it

    load = torch.compiler.load_compiled_function
    if getattr(load, "expertmesh", False):
        return

    def load_whole(*args: Any, **kwargs: Any) -> Any:
        loaded: Any = load(*args, **kwargs)
        compiled = loaded._artifacts.compiled_fn
        if not hasattr(compiled, "finalize_loading"):
            compiled.finalize_loading = lambda vllm_config: None
        return loaded

    load_whole.expertmesh = True  # type: ignore[attr-defined]
    torch.compiler.load_compiled_function = load_whole
