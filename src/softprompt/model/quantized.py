"""Base models in fewer bits: linear layers quantised here, and models that were stored quantised."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from softprompt.errors import BaseModelError, ConfigError
from softprompt.model.coded import BlockLinear, CodedLinear
from softprompt.model.experts import WITHIN, CodedExperts, is_fused
from softprompt.model.fingerprint import fingerprint_model, sampled, stored_tensors
from softprompt.model.notes import quieten_bitsandbytes, say
from softprompt.model.places import Read, Stored, fill_places, put_back, reading
from softprompt.model.state.slots import give_back_freed

PRECISIONS = ("nf4", "int8", "int4", "fp8", "gguf")
"""What linear layers can be quantised to; ``gguf``: the blocks of the GGUF file that they come from."""

INSTALL = {
    "bitsandbytes": 'pip install "softprompt[nf4]"',
    "compressed-tensors": 'pip install "softprompt[compressed]"',
    "torchao": "pip install torchao",
    "hqq": "pip install hqq",
    "quanto": "pip install optimum-quanto",
    "mxfp4": "pip install kernels triton",
}
"""How the libraries are installed that compute with models stored in each format."""

HALF = 0.5
"""Share of the layers' weights below which it is said that few of them could be quantised."""

LINEAR = 0.1
"""Share of a layer's output that rounding of its inputs to 8 bits may change at most."""

CODES = {torch.int8, torch.uint8, torch.int16, torch.int32, *(torch.float8_e4m3fn, torch.float8_e5m2)}
"""Types of numbers that only a quantised weight has."""


def require_precision(precision: str, device: torch.device) -> None:
    """Refuses a precision that this machine cannot compute with.

    Raises:
        ConfigError: it is unknown, needs a library that is not installed, or a type that the device does not have.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"--quantize must be one of {', '.join(PRECISIONS)}, not {precision!r}; choose one.")
    if precision == "nf4" and find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"nf4 is computed by the library bitsandbytes, which is not installed; {INSTALL['bitsandbytes']}, or "
            "choose int4, which needs none."
        )
    if precision == "nf4" and device.type == "mps":
        raise ConfigError("nf4 is computed by bitsandbytes on CPUs and CUDA GPUs, not on mps; choose int4 or int8.")
    if precision == "fp8":
        try:
            torch.ones(8, device=device).to(torch.float8_e4m3fn).float().sum().item()
        except (RuntimeError, TypeError) as error:
            raise ConfigError(f"The device {device} has no 8-bit floating-point numbers; choose int8.") from error


def require_plain(stored: str, wanted: str | None, base: str) -> None:
    """Refuses to quantise a model that is stored quantised, unless as that.

    Raises:
        BaseModelError: it is another precision.
    """
    if stored and wanted not in (None, stored):
        raise BaseModelError(
            f"the base model {base!r} is stored in {stored} and cannot be quantised to {wanted}; leave --quantize out, "
            "or give the model that it was made of"
        )


def quantize_layers(model: Any, precision: str, device: torch.device, name: str) -> None:
    """Replaces all linear layers but the head, and all experts, by quantised ones on the device, one by one. The
    embedding table, norms and head stay as they are.

    Args:
        model: transformers' own, not quantised yet.
        precision: of ``PRECISIONS``.
        device: where the layers go.
        name: what the user calls it.

    Raises:
        BaseModelError: it has no such layers, or is stored quantised.
        ConfigError: as ``require_precision``.
    """
    from transformers.pytorch_utils import Conv1D

    require_plain(stored_precision(model.config), precision, name)
    require_precision(precision, device)
    head = model.get_output_embeddings()
    # Not those that do more, as Llama 4's routers do.
    plain = (nn.Linear.forward, Conv1D.forward)
    linear = {
        n
        for n, m in model.named_modules()
        if type(m).forward in plain and m is not head and not re.fullmatch(WITHIN, n)
    }
    for place in sorted(linear):  # a list of the layers themselves would keep them all in memory until the end
        module = model.get_submodule(place)
        weight = module.weight.T if isinstance(module, Conv1D) else module.weight
        layer = coded_layer(weight.detach(), module.bias, precision, device)
        if layer is not None:
            model.set_submodule(place, layer)
        del module, weight
    make = partial(coded_layer, precision=precision, device=device)
    for place in sorted(n for n, m in model.named_modules() if is_fused(m)):
        experts = CodedExperts.of(model.get_submodule(place), make)
        if experts is not None:
            model.set_submodule(place, experts)
        give_back_freed()  # between the codes of many small weights, little of it is used again
    coded = codes_of(model)
    for weight in model.parameters():
        # One tensor that lies in a mapped file keeps all of the file's pages, whose layers are not needed any more.
        if weight.device.type == "cpu" and id(weight) not in coded and not hasattr(weight, "quant_state"):
            weight.data = weight.data.clone()
    done = sum(math.prod(shape) for shape in map(_shape, model.modules()) if shape is not None)
    whole = count_weights(model) - model.get_input_embeddings().weight.numel()
    if not done and precision == "gguf":
        raise BaseModelError(
            f"--quantize gguf keeps the blocks of GGUF files, such as Q4_K and Q8_0, of which {name!r} has none in its "
            "linear layers; give such a file, or choose int8 or int4"
        )
    if not done:
        raise BaseModelError(f"the base model {name!r} has no linear layers to quantise; load it without --quantize")
    if done < HALF * whole:
        say(
            f"of the weights of {name!r} behind its embedding table, {done / whole:.0%} are linear layers, which are "
            f"{precision} now; the others, such as experts, are as they were"
        )


def quantize_apart(model: Any, precision: str, paths: Sequence[Path], device: torch.device) -> None:
    """Quantises experts that the files hold one by one, on their way to the device: together, as transformers would
    hold them, they could be more than fits into memory. The model remembers the fingerprint that it would have.

    Args:
        model: with places for them, and with all other weights.
        precision: of ``PRECISIONS``.
        paths: its safetensors files.
        device: where the layers go.
    """
    dtype, apart = model.get_input_embeddings().weight.dtype, put_back(model)
    if not apart:
        return

    def weight(stored: Stored, read: Read) -> torch.Tensor:
        found = read(f"{stored.name}.weight")
        if found is None or found.shape != stored.shape:
            raise BaseModelError(
                f"the base model should hold {stored.name}.weight as {list(stored.shape)} by its configuration, but it "
                f"is {None if found is None else list(found.shape)}; give the config.json that the weights were saved "
                "with"
            )
        return found.to(dtype)

    def layers(parts: Sequence[Stored], read: Read) -> list[nn.Module]:
        weights = [weight(part, read) for part in parts]
        # The blocks of one part may be of another kind than those of the next.
        joined = weights if precision == "gguf" else [torch.cat(weights)]
        return [coded_layer(one, None, precision, device) or _as_it_is(one) for one in joined]

    with reading(paths) as read:
        parts = {name: (weight(part, read) for part in stored) for name, stored in apart.items()}
        model.stored_fingerprint = fingerprint_model(model, parts)
    fill_places(model, paths, layers)


def coded_layer(
    weight: torch.Tensor, bias: torch.Tensor | None, precision: str, device: torch.device
) -> nn.Module | None:
    """The quantised layer on the device.

    Args:
        weight: ``[out, in]``.
        bias: ``[out]``, or None.
        precision: of ``PRECISIONS``.
        device: where it goes.

    Returns:
        None of ``gguf``, if the weight is not made of blocks.
    """
    weight, bias = weight.to(device), None if bias is None else bias.to(device)
    if precision == "gguf":
        return BlockLinear.of(weight, bias)
    layer: nn.Module = _nf4(weight, bias) if precision == "nf4" else CodedLinear(weight, bias, precision)
    return layer


def _as_it_is(weight: torch.Tensor) -> nn.Linear:
    """A plain layer of a weight ``[out, in]``."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def placed(model: Any, dtype: torch.dtype, device: torch.device, name: str) -> Any:
    """The model on the device, computing in ``dtype``; codes and their scales stay as they are.

    Raises:
        BaseModelError: quantised layers of it compute no gradient.
    """
    coded = codes_of(model)
    # Not ``model.to(dtype)``: it would round the rotary frequencies too, which in bf16 is a radian at 1000 tokens.
    for weight in model.parameters():
        if weight.is_floating_point() and id(weight) not in coded:
            weight.data = weight.data.to(dtype)
    keep_as_stored(model)
    places = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    # transformers refuses to move some kinds, even to where they are
    if not all(place.type == device.type and device.index in (None, place.index) for place in places):
        model = model.to(device)
    _require_input_gradient(model, name)
    return model


def bytes_of(model: nn.Module) -> int:
    """Bytes of all weights in memory, codes and their scales included."""
    return sum(tensor.nbytes for _, tensor in stored_tensors(model))


def _nf4(weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
    """A layer of bitsandbytes, with the scales of its blocks quantised as well (QLoRA, Dettmers et al. 2023, section
    3)."""
    quieten_bitsandbytes()
    import bitsandbytes as untyped

    library: Any = untyped
    rows, columns = weight.shape
    layer: Any = library.nn.Linear4bit(columns, rows, bias=False, quant_type="nf4", device="meta")
    layer.weight = library.nn.Params4bit(weight.float().contiguous(), requires_grad=False, quant_type="nf4").to(
        weight.device
    )
    layer.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    return layer


def keep_as_stored(model: nn.Module) -> None:
    """Keeps bitsandbytes from laying out its weights anew on a CPU when text is written: the layout has no gradient,
    and the weights are not what they were."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False


# --- what is quantised already --------------------------------------------------------------------


def stored_precision(config: Any) -> str:
    """What a model was stored in, such as ``nf4`` or ``gptq 4-bit``; empty for one that is not quantised."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return ""
    given = dict(found if isinstance(found, dict) else found.to_dict())
    if given.get("load_in_4bit") or given.get("_load_in_4bit"):
        return str(given.get("bnb_4bit_quant_type", "fp4"))
    if given.get("load_in_8bit") or given.get("_load_in_8bit"):
        return "int8"
    bits = given.get("bits") or given.get("nbits") or given.get("w_bit")
    return method_of(config) + (f" {bits}-bit" if bits else "")


def method_of(config: Any) -> str:
    """Which library or format a stored model was quantised by, in transformers' words; empty for none."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return ""
    given = dict(found if isinstance(found, dict) else found.to_dict())
    if given.get("load_in_4bit") or given.get("load_in_8bit"):
        return "bitsandbytes"
    method = given.get("quant_method") or "unknown"
    return str(getattr(method, "value", method))


def require_method(config: Any, base: str) -> None:
    """Refuses a stored format that transformers does not know: it would take the codes for weights."""
    method = method_of(config)
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as KNOWN

    if method and not any(name.startswith(method) for name in KNOWN):
        raise BaseModelError(
            f"the base model {base!r} is quantised by {method!r}, which this release of transformers does not know; "
            "give the model that it was made of, and --quantize"
        )


def loading_options(config: Any, device: torch.device, base: str) -> dict[str, Any]:
    """With what transformers loads a model that is stored quantised."""
    method = method_of(config)
    if method == "bitsandbytes":
        quieten_bitsandbytes()
    if is_unpacked(config, device):
        config.quantization_config["dequantize"] = True
        why = "compressed-tensors stores in few bits, and computes with all"
        if method != "compressed-tensors":
            why = f"the products of {method.upper()} weights need a CUDA GPU, and the device is {device.type}"
        say(f"the weights of {base} are unpacked to 16 bits: {why}")
    return {"device_map": {"": str(device)}}


def is_unpacked(config: Any, device: torch.device) -> bool:
    """Whether transformers makes a model plain that is stored quantised when it loads it to the device."""
    method = method_of(config)
    if method == "compressed-tensors":
        # Its layers have no product of their own: the first pass of the whole model would unpack them all.
        return find_spec("compressed_tensors") is not None
    return method in ("fp8", "mxfp4") and device.type != "cuda"


def require_whole_blocks(paths: Sequence[Path], block: Sequence[int], base: str) -> None:
    """Refuses FP8 weights that end in a part of a block: transformers unpacks them as if all blocks were smaller.

    Args:
        paths: the files.
        block: rows and columns that share a scale.
        base: what the user calls the model.

    Raises:
        BaseModelError: there is such a weight.
    """
    shapes = dict[str, list[int]]()
    for path in paths:
        with safe_open(path, framework="pt") as file:
            shapes |= {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    for name, shape in shapes.items():
        parts = [size > one and size % one for size, one in zip(shape[-2:], block, strict=False)]
        if f"{name}_scale_inv" in shapes and any(parts):
            raise BaseModelError(
                f"the base model {base!r} is stored in fp8 by blocks of {list(block)}, which do not divide its {name} "
                f"of {shape}, and transformers unpacks such weights wrongly; give the model that it was made of, and "
                "--quantize fp8"
            )


def remedy_for(config: Any) -> str:
    """What to do where a stored model cannot be computed with."""
    known = INSTALL.get(method_of(config))
    return (f"{known}, or " if known else "") + "give the model that it was made of, and --quantize"


def is_quantized(module: nn.Module) -> bool:
    """Whether a module's own weights are codes."""
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return any(tensor.dtype in CODES or hasattr(tensor, "__tensor_flatten__") for tensor in own)


def is_own(model: nn.Module) -> bool:
    """Whether all of a model's quantised layers, if there are any, are ours, which wait for nothing."""
    return all(isinstance(module, CodedLinear | BlockLinear) for module in model.modules() if is_quantized(module))


def codes_of(model: nn.Module) -> set[int]:
    """The ``id`` of each parameter that stays as it is whatever type the model computes in: codes and their scales."""
    return {
        id(tensor)
        for module in model.modules()
        if is_quantized(module)
        for name, tensor in module.named_parameters(recurse=False)
        if name != "bias"
    }


def _shape(module: Any) -> tuple[int, int] | None:
    """``(out, in)`` of a quantised linear layer; None for any other module."""
    has = hasattr(module, "out_features") and hasattr(module, "in_features")
    return (int(module.out_features), int(module.in_features)) if has and is_quantized(module) else None


def sizes_of(module: nn.Module) -> Iterator[tuple[str, Sequence[int]]]:
    """Each weight's name and shape; of a quantised linear layer, those of the weight that it stands for."""
    for name, part in module.named_modules():
        prefix, shape = f"{name}." if name else "", _shape(part)
        if shape is not None:
            yield f"{prefix}weight", shape
            if getattr(part, "bias", None) is not None:
                yield f"{prefix}bias", shape[:1]
        else:
            yield from ((f"{prefix}{own}", tuple(w.shape)) for own, w in part.named_parameters(recurse=False))


def count_weights(model: nn.Module) -> int:
    """How many weights a model has, shared ones counted once, and codes as the weights that they stand for."""
    shapes = {module: shape for module in model.modules() if (shape := _shape(module)) is not None}
    coded = {
        id(weight) for module in shapes for name, weight in module.named_parameters(recurse=False) if name != "bias"
    }
    plain = sum(weight.numel() for weight in model.parameters() if id(weight) not in coded)
    return plain + sum(rows * columns for rows, columns in shapes.values())


def _require_input_gradient(model: nn.Module, name: str) -> None:
    """Refuses layers that compute no gradient in their inputs, or another one than that of what they compute: the
    gradient would go around them, along the residual stream, and nothing would be said.

    Raises:
        BaseModelError: a layer is of such a kind.
    """
    tried = set[type]()
    for module in model.modules():
        shape = _shape(module)
        if type(module) in tried or shape is None:
            continue
        tried.add(type(module))
        own = next(iter([*module.parameters(recurse=False), *module.buffers(recurse=False)]))
        dtype = next((w.dtype for w in model.parameters() if w.dtype in (torch.bfloat16, torch.float16)), torch.float32)
        noise = torch.randn(4, shape[1], generator=torch.Generator().manual_seed(0))
        inputs = noise.to(own.device, dtype).requires_grad_()
        with torch.enable_grad():
            try:
                output = module(inputs) - module(torch.zeros_like(inputs)).detach()
                (gradient,) = torch.autograd.grad(output, inputs, output.detach())
            except (RuntimeError, NotImplementedError) as error:
                reason = " ".join(str(error).split())[:120]
                raise _no_gradient(name, module, reason) from error
        size = float(output.detach().float().square().sum())
        if abs(float((gradient.float() * inputs.detach().float()).sum()) - size) > LINEAR * size:
            raise _no_gradient(name, module, "the gradient is not that of what they compute")


def _no_gradient(name: str, module: nn.Module, reason: str) -> BaseModelError:
    return BaseModelError(
        f"the quantised layers of the base model {name!r} ({type(module).__name__}) have no gradient in their inputs "
        f"here ({reason}), which a soft prompt learns by; leave --dtype out, or give the model that it was made "
        "of, and --quantize"
    )


def holds(paths: Sequence[Path], table: torch.Tensor) -> bool:
    """Whether one of the files holds these numbers ``[V, H]``, as a sample of them tells."""
    wanted = hashlib.sha256()
    sampled(wanted, "", table)
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if "embed" not in name and "wte" not in name:
                    continue
                found = hashlib.sha256()
                sampled(found, "", file.get_tensor(name).to(table.dtype))
                if found.digest() == wanted.digest():
                    return True
    return False


def fingerprint_files(model_type: str, paths: Sequence[Path]) -> str:
    """Hex digest of a model's type and a sample of every tensor in its safetensors files, codes and scales alike: what
    libraries make of them in memory differs by device.

    Args:
        model_type: as its configuration says.
        paths: all files of its weights.
    """
    digest = hashlib.sha256(f"{model_type} as stored".encode())
    places: dict[str, Path] = {}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            places |= dict.fromkeys(file.keys(), path)
    for name, path in sorted(places.items()):
        with safe_open(path, framework="pt") as file:
            sampled(digest, name, file.get_tensor(name))
    return digest.hexdigest()
