"""Slots of GPU memory that other processes can map: what an expert host lends to engines on its GPU.

A range of addresses is reserved for all slots, and memory is taken slot by slot, so that a slot costs nothing until
an expert is loaded into it. The memory of a slot can be exported as a file descriptor; who imports it maps the same
memory at an address of its own choice. The driver keeps memory for as long as anybody has it mapped: an engine goes on
computing with the experts of a host that was killed, and the memory is free when it lets them go.

Source: CUDA driver API, "Virtual Memory Management".
"""

from __future__ import annotations

import math
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch

from actors.cuda_driver import checked


class CudaSlots:
    """`room` slots of at least `slot_bytes` on one device, in one range of addresses."""

    def __init__(self, device: int, room: int, slot_bytes: int) -> None:
        from cuda.bindings import driver

        torch.cuda.init()
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()
            step = _granularity(device)
            self.device, self.room = device, room
            self.slot_bytes = -(-slot_bytes // step) * step
            """Bytes from one slot to the next, and that each takes."""
            self._base = int(checked(driver.cuMemAddressReserve(self.slot_bytes * room, step, 0, 0)))
        self._memory: dict[int, Any] = {}

    @property
    def address(self) -> int:
        """Of the first slot, in this process."""
        return self._base

    def bytes(self) -> torch.Tensor:
        """All slots as uint8 [room, slot_bytes]; those that have no memory must not be touched."""
        storage = torch._C._construct_storage_from_data_pointer(
            self._base, torch.device("cuda", self.device), self.slot_bytes * self.room
        )
        flat = torch.empty(0, dtype=torch.uint8, device=f"cuda:{self.device}").set_(storage)  # type: ignore[call-overload]
        view: torch.Tensor = flat.view(self.room, self.slot_bytes)
        return view

    def view(self, offset: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """A tensor that begins so many bytes behind the first slot's begin."""
        flat = self.bytes().reshape(-1)
        end = offset + math.prod(shape) * dtype.itemsize
        return flat[offset:end].view(dtype).view(shape)

    def clear(self, size: int) -> None:
        """Write zeros to the first bytes, and wait until they are there."""
        self.bytes().reshape(-1)[:size].zero_()
        torch.cuda.synchronize(self.device)

    def has(self, slot: int) -> bool:
        """Whether a slot has memory."""
        return slot in self._memory

    def take(self, slot: int) -> None:
        """Give a slot memory of its own, uninitialised. HostError where the GPU has none left."""
        from cuda.bindings import driver

        self._map(slot, checked(driver.cuMemCreate(self.slot_bytes, _properties(self.device), 0)))

    def export(self, slot: int) -> int:
        """A descriptor of a slot's memory, to be sent to another process and closed here."""
        from cuda.bindings import driver

        return int(checked(driver.cuMemExportToShareableHandle(self._memory[slot], _descriptor(), 0)))

    def attach(self, slot: int, descriptor: int) -> None:
        """Have in a slot the memory that another process exported; the descriptor is closed."""
        from cuda.bindings import driver

        try:
            memory = checked(driver.cuMemImportFromShareableHandle(descriptor, _descriptor()))
        finally:
            os.close(descriptor)
        self._map(slot, memory)

    def alias(self, slot: int, other: CudaSlots, of: int) -> None:
        """Have in a slot the memory of another slot of this process."""
        from cuda.bindings import driver

        self._map(slot, checked(driver.cuMemRetainAllocationHandle(other._base + of * other.slot_bytes)))

    def release(self, slot: int) -> None:
        """Let a slot's memory go; it is free when nobody else has it. Nothing on the GPU may use it any more."""
        from cuda.bindings import driver

        memory = self._memory.pop(slot)
        checked(driver.cuMemUnmap(self._base + slot * self.slot_bytes, self.slot_bytes))
        checked(driver.cuMemRelease(memory))

    def _map(self, slot: int, memory: Any) -> None:
        from cuda.bindings import driver

        if slot in self._memory:
            self.release(slot)
        address = self._base + slot * self.slot_bytes
        try:
            checked(driver.cuMemMap(address, self.slot_bytes, 0, memory, 0))
        except BaseException:
            driver.cuMemRelease(memory)
            raise
        self._memory[slot] = memory
        access = driver.CUmemAccessDesc()
        access.location = _properties(self.device).location
        access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        checked(driver.cuMemSetAccess(address, self.slot_bytes, [access], 1))


def _descriptor() -> Any:
    from cuda.bindings import driver

    return driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR


@cache
def _properties(device: int) -> Any:
    from cuda.bindings import driver

    wanted = driver.CUmemAllocationProp()
    wanted.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    wanted.requestedHandleTypes = _descriptor()
    wanted.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    wanted.location.id = device
    return wanted


@cache
def _granularity(device: int) -> int:
    from cuda.bindings import driver

    least = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
    return int(checked(driver.cuMemGetAllocationGranularity(_properties(device), least)))


def gpus_here() -> int:
    """How many GPUs the machine has, those included that this process may not use."""
    try:
        return len(list(Path("/proc/driver/nvidia/gpus").iterdir()))
    except OSError:
        return torch.cuda.device_count()


def gpu_name(device: int) -> str:
    """What tells one GPU from another, whatever number a process knows it by."""
    properties: Any = torch.cuda.get_device_properties(device)
    return str(properties.uuid)
