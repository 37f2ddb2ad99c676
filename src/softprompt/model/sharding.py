"""A base model that is larger than a device: each process holds a part of every decoder layer.

The embedding table, the head and the soft prompt are whole in each process. A model is loaded whole in the machine's
own memory and goes to the device layer by layer, so that a device never holds more than a layer besides its parts.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from softprompt.errors import ConfigError
from softprompt.model.distributed import World

KEPT_WHOLE = "replicated_with_grad_allreduce"
"""Transformers' word for weights that each process has whole; of frozen ones there is no gradient to add up."""


def divide(model: Any, layers: nn.ModuleList, world: World, device: torch.device, name: str) -> None:
    """Leaves a process its part of a model's decoder layers, on its device.

    Args:
        model: transformers' own, whole, on the CPU, with weights that require no gradient.
        layers: its decoder layers.
        world: the processes, and how they divide it.
        device: where this process computes.
        name: the base model's.

    Raises:
        ConfigError: an encoder–decoder; or for tensor parallel, a model without a plan, with a plan of another kind, or
            with a number of heads that the processes do not divide.
    """
    if model.config.is_encoder_decoder:
        raise ConfigError(
            f"--shard {world.shard} divides decoder-only models, but {name} is an encoder-decoder; leave it out."
        )
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(device.type, (world.size,))
    if world.shard == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for layer in layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        return
    from torch.distributed.tensor.parallel import parallelize_module

    parallelize_module(model.to(device), mesh, _styles(model, layers, world, name))


def _styles(model: Any, layers: nn.ModuleList, world: World, name: str) -> dict[str, Any]:
    """How each linear layer is divided, by its name in the model."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    ways: dict[str, Callable[[], Any]] = {
        "colwise": ColwiseParallel,
        "rowwise": RowwiseParallel,
        "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
        "rowwise_split_input": lambda: RowwiseParallel(input_layouts=Replicate()),
    }
    inside = {id(module) for layer in layers for module in layer.modules()}
    places = {place: module for place, module in model.named_modules() if id(module) in inside}
    plan = {pattern: way for pattern, way in (model.tp_plan or {}).items() if ".layers." in f".{pattern}"}
    other = "; take --shard fsdp, which divides any"
    if not plan:
        raise ConfigError(f"transformers has no plan for dividing {name} by --shard tp{other}.")
    found: dict[str, Any] = {}
    for pattern, way in plan.items():
        shape = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
        fitting = [place for place in places if shape.fullmatch(place)]
        if way == KEPT_WHOLE:
            continue
        if way not in ways or not fitting or not all(type(places[place]) is nn.Linear for place in fitting):
            raise ConfigError(
                f"--shard tp divides plain linear layers, but the plan for {name} has {pattern} as {way}{other}."
            )
        if way == "colwise" and "attention" in pattern.replace("attn", "attention"):
            _require_heads(model, world, name)
        found |= {place: ways[way]() for place in fitting}
    return found


def _require_heads(model: Any, world: World, name: str) -> None:
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    for number, what in (
        (heads, "attention heads"),
        (getattr(config, "num_key_value_heads", None) or heads, "key/value heads"),
    ):
        if number % world.size:
            raise ConfigError(
                f"--shard tp gives each process as many heads, but {name} has {number} {what} for {world.size} "
                "processes; take a number of processes that divides them, or --shard fsdp."
            )


def here(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a weight: the weight itself, unless it is in parts."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
