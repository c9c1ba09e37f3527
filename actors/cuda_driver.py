"""CUDA's driver as Python: memory that processes can share, kernels compiled at run time.

`cuda-bindings` comes with CUDA builds of torch. Everything here is for machines with an NVIDIA GPU; nothing is
imported before it is needed.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch

from cluster.errors import HostError


def checked(result: tuple[Any, ...]) -> Any:
    """What a driver call returned, without its error code. Raises HostError that names the code."""
    code, *values = result
    if int(code) != 0:
        raise HostError(f"CUDA's driver says {code.name}", "see `nvidia-smi` for the GPU's memory and state")
    return values[0] if len(values) == 1 else tuple(values) or None


@cache
def compiled(source: Path, device: int) -> Any:
    """The module of a CUDA source file, compiled for this device. HostError with the compiler's words."""
    from cuda.bindings import driver, nvrtc

    major, minor = torch.cuda.get_device_capability(device)
    options = [f"--gpu-architecture=sm_{major}{minor}".encode(), b"-std=c++17"]
    program = checked(nvrtc.nvrtcCreateProgram(source.read_bytes(), source.name.encode(), 0, [], []))
    (code,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if int(code) != 0:
        log = b" " * checked(nvrtc.nvrtcGetProgramLogSize(program))
        checked(nvrtc.nvrtcGetProgramLog(program, log))
        raise HostError(f"{source.name} does not compile: {log.decode(errors='replace').strip()}")
    binary = b" " * checked(nvrtc.nvrtcGetCUBINSize(program))
    checked(nvrtc.nvrtcGetCUBIN(program, binary))
    torch.cuda.init()
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()
        return checked(driver.cuModuleLoadData(binary))


@cache
def kernel(source: Path, name: str, device: int) -> Any:
    """A kernel of a CUDA source file, to be launched by :func:`launch`."""
    from cuda.bindings import driver

    return checked(driver.cuModuleGetFunction(compiled(source, device), name.encode()))


def launch(function: Any, blocks: int, threads: int, values: tuple[Any, ...], types: tuple[Any, ...]) -> None:
    """Launch on torch's current stream, which may be capturing a graph. `types` are ctypes, None for a struct."""
    from cuda.bindings import driver

    stream = torch.cuda.current_stream().cuda_stream
    checked(driver.cuLaunchKernel(function, blocks, 1, 1, threads, 1, 1, 0, stream, (values, types), 0))
