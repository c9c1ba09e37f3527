"""What is not of experts, divided over workers that train together: for models of which one worker can't hold it all.

FSDP2 (`torch.distributed.fsdp.fully_shard`): each worker keeps a part of every matrix, and a layer is put together for
as long as it computes. What is trained is of experts, which stay where they are (`actors.expert_parallel`), so that no
gradient is divided.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from actors.text_routing import expert_modules, router_modules


def shard_dense(model: Any) -> None:
    """Divide a model's weights, but for those of experts, over all workers of the process group."""
    mesh = init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
    kept: set[nn.Parameter] = set()
    layers: dict[str, nn.Module] = {}
    names = {id(module): name for name, module in model.named_modules()}
    modules = dict(model.named_modules())
    for experts in expert_modules(model).values():
        kept |= set(experts.parameters())
    # Routers are small, and may be trained as a whole.
    kept |= {router.weight for router in router_modules(model).values()}
    for experts in expert_modules(model).values():
        # model.layers.3.mlp.experts is of model.layers.3.
        parts = names[id(experts)].split(".")
        name = ".".join(parts[: parts.index("layers") + 2])
        layers[name] = modules[name]
    for layer in layers.values():
        fully_shard(layer, mesh=mesh, ignored_params=kept)
    fully_shard(model, mesh=mesh, ignored_params=kept)
