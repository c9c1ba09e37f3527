"""Pins: which experts may only be on which hosts, from the configuration to the planner; pure functions."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.config_placement import PinConfig
from cluster.errors import ConfigError
from cluster.fleet import FleetHost, Pin
from cluster.holdings import Holders
from cluster.messages import MoeLayer


def pins(config: Sequence[PinConfig], layers: Sequence[MoeLayer]) -> tuple[Pin, ...]:
    """The configured pins, laid over a model's layers. ConfigError for layers or experts that it does not have."""
    number = {layer.index: layer.num_experts for layer in layers}
    found = []
    for at, pin in enumerate(config):
        if strange := [layer for layer in pin.layers if layer not in number]:
            raise ConfigError(
                f"placement.pins.{at}.layers: the model has no layer {strange[0]} of experts",
                f"its layers of experts: {', '.join(map(str, number))}",
            )
        mine = pin.layers or tuple(number)
        few = min(mine, key=number.__getitem__)
        if max(pin.experts) >= number[few]:
            raise ConfigError(
                f"placement.pins.{at}.experts: {max(pin.experts)}, where layer {few} has {number[few]} experts",
                "experts are counted from 0",
            )
        found.append(Pin(dict.fromkeys(mine, pin.experts), pin.device, pin.group, pin.selector))
    return tuple(found)


def misplaced(wanted: Sequence[Pin], hosts: Sequence[FleetHost], placed: Holders) -> bool:
    """Whether an expert is on a host that a pin does not admit."""
    known = {host.host_id: host for host in hosts}
    return any(
        not pin.admits(known[host_id])
        for pin in wanted
        for layer, experts in pin.experts.items()
        for expert in experts
        for host_id in placed[layer][expert]
        if host_id in known
    )
