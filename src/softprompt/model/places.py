"""Places that are left empty when transformers loads a model, and filled afterwards from the files, layer by layer: for
linear layers that are stored as codes, and for experts that the files hold one by one and the model together."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from softprompt.errors import BaseModelError
from softprompt.model.experts import CodedExperts, Expert, is_fused, is_separable, is_transposed, matrices_of, take_out
from softprompt.model.state.slots import give_back_freed

METHOD = "softprompt-places"
"""What transformers knows the quantiser by that leaves places."""

WEIGHTS = ".weight"
"""The end of names of weights that are no codes: only experts that are stored one by one are left out."""

PARTS = r"\.(qweight|qzeros|scales|g_idx|weight_(packed|scale|shape|zero_point|g_idx))$"
"""Names of what layers of codes have in the files."""

SOURCES = {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1), "down_proj": ("down_proj", 0)}
"""Of single experts' layers: into which weight of all experts they go, and at which place; unless transformers knows
better."""

Read = Callable[[str], torch.Tensor | None]
"""Reads a tensor of the files, mapped into memory; None where there is none of this name."""


@dataclass(frozen=True)
class Stored:
    """A layer in the files.

    Attributes:
        name: the beginning of its names there.
        shape: ``(out, in)``.
        biased: whether the layer has a bias.
    """

    name: str
    shape: tuple[int, int]
    biased: bool


class Place(nn.Module):
    """Where a linear layer goes that is read after all others."""

    def __init__(self, stored: Stored) -> None:
        super().__init__()
        self.stored = stored


@dataclass(frozen=True)
class Apart:
    """Experts that the files hold one by one; the attribute ``apart`` of their module while its weights are out.

    Attributes:
        experts: of each, the layers that lead into it, and the one out of it.
        parameters: what the module had before.
    """

    experts: list[tuple[list[Stored], Stored]]
    parameters: dict[str, nn.Parameter | None] = field(repr=False)


@cache
def register() -> str:
    """Makes the quantiser known to transformers that leaves places.

    Returns:
        What it is called there.
    """
    from transformers.quantizers import auto as untyped_auto
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    auto: Any = untyped_auto

    class Places(HfQuantizer):
        requires_calibration = True

        def _process_model_before_weight_loading(
            self, model: Any, checkpoint_files: Sequence[str] = (), **options: Any
        ) -> None:
            config: Any = self.quantization_config
            leave_places(model, [Path(file) for file in checkpoint_files], config.codes)

        def is_serializable(self) -> bool:
            return False

        @property
        def is_trainable(self) -> bool:
            return True

    class Config(QuantizationConfigMixin):
        def __init__(self, codes: str = "", **options: Any) -> None:
            method: Any = METHOD
            self.quant_method, self.codes = method, codes

    auto.register_quantization_config(METHOD)(Config)
    auto.register_quantizer(METHOD)(Places)
    return METHOD


def leave_places(model: Any, paths: Sequence[Path], codes: str) -> None:
    """Leaves places for the linear layers whose codes the files have, and for experts that they hold one by one.

    Args:
        model: without weights yet.
        paths: its safetensors files.
        codes: the end of names of codes, or ``WEIGHTS``.

    Raises:
        BaseModelError: there are no codes, or some belong to no linear layer of the model.
    """
    ignored: set[str] = set(model._keys_to_ignore_on_load_unexpected or ())
    found = [name.removesuffix(codes) for name in sorted(_names(paths)) if name.endswith(codes)]
    # What the architecture leaves out, layers that predict further tokens, say, if it has no layer of this name.
    beyond = {name for name in found if any(re.search(pattern, name) for pattern in ignored)}
    if not found:
        raise BaseModelError(
            f"the base model should have codes in its files, as its configuration says, but none is called *{codes}; "
            "give the config.json that it was saved with"
        )
    taken = set[str]()
    for place, experts in _experts_apart(model, found, beyond).items():
        module = model.get_submodule(place)
        if codes == WEIGHTS and (is_transposed(module) or any(down.biased for _, down in experts)):
            continue
        module.apart = Apart(experts, dict(module._parameters))
        take_out(module)
        module._is_hf_initialized = True  # transformers would fill the weights that it misses with random numbers
        own = {stored.name for up, down in experts for stored in (*up, down)}
        taken |= own
        ignored |= {rf"^{re.escape(outer)}\." for outer in (place, *{name.rsplit(".", 2)[0] for name in own})}
    if codes != WEIGHTS:
        modules = dict(model.named_modules())
        left = [stored for stored in found if stored not in taken and (stored in modules or stored not in beyond)]
        _leave_layers(model, left, modules)
        ignored |= {PARTS, rf"^({'|'.join(map(re.escape, left))})\.bias$"}
    model._keys_to_ignore_on_load_unexpected = ignored


def _leave_layers(model: Any, found: Sequence[str], modules: dict[str, nn.Module]) -> None:
    from transformers.pytorch_utils import Conv1D

    for stored in found:
        place = _place_of(stored, modules)
        module: Any = modules.get(place)
        if module is None or type(module).forward not in (nn.Linear.forward, Conv1D.forward):
            raise BaseModelError(
                f"the base model should have a linear layer for all codes in its files, but has none for {stored}, as "
                "where experts are stored in another way than its architecture has them; give the model that it was "
                "made of, and --quantize"
            )
        rows, columns = module.weight.T.shape if isinstance(module, Conv1D) else module.weight.shape
        model.set_submodule(place, Place(Stored(stored, (rows, columns), module.bias is not None)))


def _place_of(stored: str, modules: dict[str, nn.Module]) -> str:
    """The name of a module in the model; models of images and text are called otherwise than in older files."""
    if stored in modules or "layers." not in stored:
        return stored
    end = "." + stored[stored.index("layers.") :]
    found = [name for name in modules if name.endswith(end)]
    return found[0] if len(found) == 1 else stored


def _experts_apart(
    model: Any, names: Iterable[str], beyond: Collection[str]
) -> dict[str, list[tuple[list[Stored], Stored]]]:
    """The layers of all experts that the files hold one by one, by the name of the module that holds them together;
    without those modules for which layers are missing, or twice there.

    Args:
        model: without weights yet.
        names: of layers in the files.
        beyond: those that belong to no module that is called otherwise.
    """
    fused = {name: module for name, module in model.named_modules() if is_fused(module)}
    if not fused:
        return {}
    sources = SOURCES | _sources(model)
    found = {place: dict[tuple[int, str, int], str]() for place in fused}
    twice = set[str]()
    for name in names:
        match = re.fullmatch(r"(.+)\.experts\.(\d+)\.([^.]+)", name)
        if match is None or match[3] not in sources:
            continue
        place = _fused_place(match[1], fused)
        if place is None or (name in beyond and place != f"{match[1]}.experts"):
            continue
        weight, position = sources[match[3]]
        if weight not in matrices_of(fused[place]):
            continue
        key = (int(match[2]), weight, position)
        twice |= {place} if key in found[place] else set()
        found[place][key] = name
    whole = {place: _whole(fused[place], found[place]) for place in fused if place not in twice}
    return {place: experts for place, experts in whole.items() if experts is not None}


def _whole(module: Any, names: dict[tuple[int, str, int], str]) -> list[tuple[list[Stored], Stored]] | None:
    """The layers of all experts of a module; None if they are not there."""
    into, out = matrices_of(module)
    parts = {name: 1 + max((key[2] for key in names if key[1] == name), default=0) for name in (into, out)}
    wanted = {(i, name, n) for i in range(len(getattr(module, into))) for name in parts for n in range(parts[name])}
    if set(names) != wanted or parts[out] != 1 or (parts[into] > 1 and not is_separable(module)):
        return None

    def stored(index: int, name: str, position: int) -> Stored:
        weight = getattr(module, name)
        rows, columns = (weight.mT if is_transposed(module) else weight).shape[1:]
        biased = getattr(module, f"{name}_bias", None) is not None
        return Stored(names[index, name, position], (rows // parts[name], columns), biased)

    return [
        ([stored(index, into, n) for n in range(parts[into])], stored(index, out, 0))
        for index in range(len(getattr(module, into)))
    ]


def _sources(model: Any) -> dict[str, tuple[str, int]]:
    """As ``SOURCES``, what transformers knows of the model: by which names single experts' weights are put together."""
    from transformers.conversion_mapping import get_model_conversion_mapping as untyped

    conversions: Any = untyped
    found = dict[str, tuple[str, int]]()
    for conversion in conversions(model):
        steps = [(type(step).__name__, getattr(step, "dim", None)) for step in getattr(conversion, "operations", ())]
        targets = conversion.target_patterns
        if steps in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]) and len(targets) == 1:
            for position, pattern in enumerate(conversion.source_patterns):
                part = pattern.removesuffix(".weight").rpartition(".")[2]
                found[part] = targets[0].rpartition(".")[2], position
    return found


def _fused_place(outer: str, fused: dict[str, nn.Module]) -> str | None:
    """The module of the experts that the files have in ``outer``, whose layers may be called otherwise in the model."""
    if f"{outer}.experts" in fused:
        return f"{outer}.experts"
    layer = re.search(r"(?:^|\.)(layers\.\d+\.)", f"{outer}.")
    same = [place for place in fused if layer and layer[1] in place]
    return same[0] if len(same) == 1 else None


@contextmanager
def reading(paths: Sequence[Path]) -> Iterator[Read]:
    """Opens safetensors files."""
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, framework="pt")) for path in paths]
        holders = {name: file for file in files for name in file.keys()}  # noqa: SIM118
        yield lambda name: holders[name].get_tensor(name) if name in holders else None


def put_back(model: nn.Module) -> dict[str, list[Stored]]:
    """Gives modules whose experts are apart their weights back, as tensors without numbers.

    Returns:
        By the name of each weight, where its numbers are in the files, one part after the other.
    """
    found = dict[str, list[Stored]]()
    for name, module in model.named_modules():
        if isinstance(apart := getattr(module, "apart", None), Apart):
            vars(module)["_parameters"] = apart.parameters | module._parameters
            into, out = matrices_of(module)
            found[f"{name}.{into}"] = [part for up, _ in apart.experts for part in up]
            found[f"{name}.{out}"] = [down for _, down in apart.experts]
    return found


def fill_places(
    model: Any, paths: Sequence[Path], layers: Callable[[Sequence[Stored], Read], Sequence[nn.Module]]
) -> None:
    """Reads the layers of all places, one by one.

    Args:
        model: with places.
        paths: its safetensors files.
        layers: makes the layers whose outputs, side by side, are those of the given ones; for one, it makes one.
    """
    put_back(model)
    places = [name for name, module in model.named_modules() if isinstance(module, Place) or hasattr(module, "apart")]
    with reading(paths) as read:
        for name in places:
            module = model.get_submodule(name)
            if isinstance(module, Place):
                (layer,) = layers([module.stored], read)
            else:
                apart = module.apart
                del module.apart
                made = (Expert(layers(up, read), *layers([down], read)) for up, down in apart.experts)
                layer = CodedExperts(module, made)
                give_back_freed()  # between the codes of many small weights, little of it is used again
            model.set_submodule(name, layer)


def _names(paths: Sequence[Path]) -> list[str]:
    names = list[str]()
    for path in paths:
        with safe_open(path, framework="pt") as file:
            names += file.keys()
    return names
