"""Base models that are stored as integer codes with a scale for each group of neighbours: GPTQ, AWQ, AutoRound in these
layouts, and the packed format of compressed-tensors.

Codes are read from the files as they are, and only laid out anew: layers compute with the very numbers that they stand
for, on any device, with a gradient in their inputs, and with none of the libraries that wrote them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from softprompt.errors import BaseModelError
from softprompt.model.coded import BlockLinear
from softprompt.model.places import Read, Stored, fill_places

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where AWQ puts each of eight neighbouring outputs in a word of 32 bits (Lin et al. 2024; its GEMM layout)."""

CODES = {"gptq": ".qweight", "awq": ".qweight", "compressed-tensors": ".weight_packed"}
"""Ends of names of codes in each layout."""

READ = {"gptq": (("gptq", "gptq_v2"), (2, 4, 8)), "awq": (("gemm",), (4,))}
"""Layouts of each method that are read, the one first that a configuration need not name, and numbers of bits."""


@dataclass(frozen=True)
class Layout:
    """How the layers of a folder are stored.

    Attributes:
        name: ``gptq``, ``awq`` or ``compressed-tensors``.
        bits: of a code; 2, 4 or 8.
        group: how many weights of a row share a scale; 0: all.
        less_one: whether the codes that stand for 0 are stored less one, as in GPTQ's first format.
        needs: ends of names of what a layer must have beside codes and scales.
    """

    name: str
    bits: int
    group: int
    less_one: bool = False
    needs: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name} {self.bits}-bit"


def layout_of(config: Any, base: str) -> Layout | None:
    """How a model is stored; None if it is not stored in groups of integer codes.

    Args:
        config: transformers' configuration of the model.
        base: what the user calls it.

    Raises:
        BaseModelError: it is, in a layout that cannot be read here.
    """
    given = getattr(config, "quantization_config", None) or {}
    given = dict(given if isinstance(given, dict) else given.to_dict())
    method, bits = str(given.get("quant_method", "")), int(given.get("bits") or given.get("w_bit") or 4)
    if method == "auto-round":
        packing = str(given.get("packing_format", ""))
        method = {"auto_round:auto_gptq": "gptq", "auto_round:auto_awq": "awq"}.get(packing, method)
    if method == "compressed-tensors":
        return _compressed(given)
    if method not in ("gptq", "awq"):
        return None
    own = "checkpoint_format" if method == "gptq" else "version"
    stored = str(given.get(own) or given.get("format") or READ[method][0][0]).lower()
    stored = "marlin" if given.get("is_marlin_format") else stored
    layouts, widths = READ[method]
    if stored not in layouts or bits not in widths or given.get("pack_dtype", "int32") not in ("int32", torch.int32):
        raise BaseModelError(
            f"the base model {base!r} is stored in {method} with {bits} bits in the layout {stored!r}; GPTQ with "
            "2, 4 or 8 bits in the layouts 'gptq' and 'gptq_v2', and AWQ with 4 bits in the layout 'gemm' are read, "
            "packed in words of 32 bits: give one of these, or the model that it was made of, and --quantize"
        )
    group = int(given.get("group_size") or given.get("q_group_size") or 0)
    needs = ("g_idx",) if method == "gptq" and given.get("desc_act") else ()
    return Layout(method, bits, max(group, 0), stored == "gptq", needs)


def _compressed(given: dict[str, Any]) -> Layout | None:
    """Of compressed-tensors: weights alone, in packed integers of one width; the library unpacks all else."""
    groups = [group for group in (given.get("config_groups") or {}).values() if isinstance(group, dict)]
    formats = {given.get("format"), *(group.get("format") or given.get("format") for group in groups)}
    schemes = [group.get("weights") or {} for group in groups]
    weights = {(one.get("num_bits"), one.get("group_size") or 0, one.get("symmetric", True)) for one in schemes}
    plain = not any(group.get("input_activations") or group.get("output_activations") for group in groups)
    if formats != {"pack-quantized"} or not plain or len(weights) != 1:
        return None
    ((bits, group, symmetric),) = weights
    needs: tuple[str, ...] = () if symmetric else ("weight_zero_point",)
    if any(str(one.get("actorder")).lower() == "group" for one in schemes):
        needs += ("weight_g_idx",)
    return Layout("compressed-tensors", bits, max(group, 0), needs=needs) if bits in (4, 8) else None


def fill(model: Any, paths: Sequence[Path], layout: Layout, device: torch.device, base: str) -> None:
    """Reads the layers of all places from the files to the device, one by one.

    Raises:
        BaseModelError: one of them is stored in another way than the configuration says.
    """

    def layers(parts: Sequence[Stored], read: Read) -> list[nn.Module]:
        def moved(name: str) -> torch.Tensor | None:
            found = read(name)
            return None if found is None else found.to(device)

        return [_read_layer(part, layout, moved, base) for part in parts]

    fill_places(model, paths, layers)


def _read_layer(stored: Stored, layout: Layout, read: Read, base: str) -> BlockLinear:
    try:
        return _layer(stored, layout, read)
    except (ValueError, RuntimeError, AttributeError, TypeError) as error:
        raise BaseModelError(
            f"the base model {base!r} should hold {stored.name} of {list(stored.shape)} in the layout of {layout}, but "
            f"it cannot be read so ({' '.join(str(error).split())[:120]}); give the model that it was made of, and "
            "--quantize"
        ) from error


def _layer(stored: Stored, layout: Layout, read: Read) -> BlockLinear:
    def part(end: str) -> torch.Tensor:
        found = read(f"{stored.name}.{end}")
        if found is None:
            raise ValueError(f"it has no {end}")
        return found

    for end in layout.needs:
        part(end)
    rows, columns = stored.shape
    bits, groups = layout.bits, read(f"{stored.name}.g_idx")
    if layout.name == "compressed-tensors":
        codes, scales = _codes(part("weight_packed"), bits), part("weight_scale")
        groups, zeros = (read(f"{stored.name}.{end}") for end in ("weight_g_idx", "weight_zero_point"))
        # Without offsets, codes are signed, and stored from the lowest one on.
        middle = torch.full(scales.shape, 1 << bits - 1, dtype=torch.uint8, device=scales.device)
        zeros = middle if zeros is None else _codes(zeros.t(), bits).t()
    elif layout.name == "gptq":
        codes, scales, words = _codes(part("qweight").t(), bits), part("scales").t(), part("qzeros")
        # The one is added to whole words, since that is how it was subtracted.
        zeros = _codes(words + _ones(bits) if layout.less_one else words, bits).t()
    else:
        scales, both = part("scales").t(), [_codes(part(name), bits) for name in ("qweight", "qzeros")]
        codes, zeros = (found.view(len(found), -1, 8)[..., list(AWQ_ORDER)].flatten(1).t() for found in both)
    codes, zeros = codes[:, :columns], zeros[:rows]  # the last word may have room for more
    size = layout.group or columns
    shape = [rows, -(-columns // size)]
    if list(codes.shape) != [rows, columns] or list(scales.shape) != shape or list(zeros.shape) != shape:
        raise ValueError(f"its codes are {list(codes.shape)}, its scales {list(scales.shape)} and {list(zeros.shape)}")
    order = None if groups is None else _order(groups, size)
    if order is not None:
        codes = codes[:, order.argsort()]
    bias = read(f"{stored.name}.bias")
    if bias is not None and not stored.biased:
        if bias.any():
            raise ValueError("it has a bias, and the architecture none")
        bias = None
    return BlockLinear.grouped(codes, scales, zeros, size, bias, order)


def _order(groups: torch.Tensor, size: int) -> torch.Tensor | None:
    """Where each input lies once those of each group lie side by side; None if they do.

    Args:
        groups: ``[in]``, which group each input is of.
        size: of a group.
    """
    wanted = torch.arange(len(groups), device=groups.device) // size
    if torch.equal(groups.long(), wanted):
        return None
    by_group = groups.long().argsort(stable=True)
    if not torch.equal(groups[by_group].long(), wanted):
        raise ValueError(f"its groups are not of {size}")
    return by_group.argsort()


def _codes(words: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 ``[n, m · 32 / bits]`` of int32 ``[n, m]``: the first code is in the lowest bits."""
    codes = words.contiguous().view(torch.uint8)
    if bits == 8:
        return codes
    mask = (1 << bits) - 1
    return torch.stack([codes >> shift & mask for shift in range(0, 8, bits)], dim=-1).flatten(1)


def _ones(bits: int) -> int:
    """A word of 32 bits in which each code is one."""
    return sum(1 << shift for shift in range(0, 32, bits))
