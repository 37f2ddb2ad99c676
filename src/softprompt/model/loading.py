"""Finding and loading a base model: an alias, a hub id, a folder or a GGUF file → a transformers model and its
tokenizer."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError

from softprompt.data.packages import DEFAULT_BASE, SMOLLM2_GGUF
from softprompt.errors import BaseModelError, ConfigError
from softprompt.files import StrPath, cache_folder, local_path
from softprompt.model.files import ADAPTER, INDEX, WEIGHTS, adapter_alone, adapts, locate
from softprompt.model.fingerprint import fingerprint_model
from softprompt.model.grouped import CODES, fill, layout_of
from softprompt.model.notes import heard, say
from softprompt.model.places import WEIGHTS as PLAIN
from softprompt.model.places import register
from softprompt.model.quantized import (
    fingerprint_files,
    holds,
    is_unpacked,
    loading_options,
    quantize_apart,
    remedy_for,
    require_method,
    require_plain,
    require_whole_blocks,
    stored_precision,
)

BUFFERS = (".inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")
"""Ends of names of what older releases of transformers stored, and is computed anew."""

LANGUAGE_MODEL = {r"^model\.language_model\.": "model."}
"""What the weights of Gemma 3n are called in its language model alone: what reads images needs a library of its own."""

OTHER_SENSES = ("model.vision_tower.", "model.audio_tower.", "model.embed_vision.", "model.embed_audio.")
"""Beginnings of names of its other weights."""

WHAT_TO_GIVE = f"give {DEFAULT_BASE}, a hub id, a folder saved by transformers or a .gguf file"

WHERE_TO_PUT_A_TOKENIZER = "put the original's tokenizer beside config.json (tokenizer.save_pretrained writes it)"

NO_ADAPTER = {"subfolder": "no adapter"}
"""Where PEFT is installed, transformers would apply an adapter that lies in the model's own folder."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def lasting(base: StrPath) -> str:
    """A base model's id; a path on this machine by its full name, so that it is found again from another folder."""
    path, text = local_path(base), os.fspath(base)
    return str(path.resolve()) if text != DEFAULT_BASE and path.exists() else text


def pick_device(name: str = "auto") -> torch.device:
    """``auto`` → CUDA, else MPS, else the CPU; anything else is torch's own name of a device.

    Raises:
        ConfigError: unknown to torch, or not on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ConfigError(f"--device must be auto, cpu, cuda or mps and be on this machine; {name!r} is not") from error
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` → bf16 where the processor computes it natively (AVX512-BF16, AMX, recent CUDA GPUs), otherwise fp32.

    Raises:
        ConfigError: not one of auto, fp32, bf16, fp16.
    """
    if name == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
        native = device.type == "cpu" and any(
            getattr(torch.cpu, probe, lambda: False)()
            for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        )
        return torch.bfloat16 if native else torch.float32
    if name not in DTYPES:
        raise ConfigError(f"--dtype must be auto, fp32, bf16 or fp16, not {name!r}")
    return DTYPES[name]


def own_dtype(model: Any) -> str:
    """What a loaded model computes in, as ``--dtype`` calls it; ``auto`` where that has no name."""
    found = model.get_input_embeddings().weight.dtype
    return next((name for name, dtype in DTYPES.items() if dtype == found), "auto")


def load_base(
    base: str, *, trust_remote_code: bool = False, device: torch.device | None = None, quantize: str | None = None
) -> tuple[Any, Any]:
    """Loads a causal language model, one of images and text, or an encoder–decoder on the CPU, in the dtype it is
    stored in: its own weights, whatever adapters lie beside them. What transformers says of it that concerns the user
    becomes a ``SoftPromptWarning``.

    Args:
        base: ``smollm2-135m``, a folder with ``config.json`` and safetensors, a GGUF file, or a hub id.
        trust_remote_code: run code that comes with the model; never unless the user says so.
        device: where a model goes that is stored quantised; None: the CPU.
        quantize: what it is to be quantised to afterwards: one that is stored quantised is refused, unless as that.

    Returns:
        The transformers model and tokenizer. A model that is stored quantised has its ``stored_fingerprint``, of its
        files.

    Raises:
        BaseModelError: it cannot be found or read, lacks weights, or is of a type that is none of these.
    """
    with heard():
        if base == DEFAULT_BASE:
            path: Path | None = _dequantized(SMOLLM2_GGUF.path(), SMOLLM2_GGUF.sha256[:16])
        else:
            path = locate(base)
            if path is not None and path.is_file():
                stat = path.stat()
                key = hashlib.sha256(f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:16]
                path = _dequantized(path, key)
        place = torch.device("cpu") if device is None else device
        return _from_pretrained(base if path is None else str(path), base, trust_remote_code, place, quantize)


def _from_pretrained(
    source: str, base: str, trust_remote_code: bool, device: torch.device, quantize: str | None
) -> tuple[Any, Any]:
    import transformers
    from transformers import AutoConfig, AutoTokenizer

    called = f"base model {base!r} could not be loaded"
    whole = f"the {called} as a language model in safetensors or GGUF"

    def load(loader: Callable[..., Any], refusal: str = whole, remedy: str = WHAT_TO_GIVE, **options: Any) -> Any:
        try:
            return loader(source, trust_remote_code=trust_remote_code, **options)
        except BaseModelError:
            raise
        except Exception as error:  # of transformers alone: OSError, ValueError, KeyError, HTTP errors, …
            raise BaseModelError(f"{refusal}: {_reason(error)}; {remedy}") from error

    adapter = _adapter_beside(source, base)
    config = load(AutoConfig.from_pretrained)
    loader = _loader(config, base)
    options, remedy = dict[str, Any](), WHAT_TO_GIVE
    if config.model_type == "gemma3n":
        whole_config, config, options = config, config.get_text_config(), {"key_mapping": LANGUAGE_MODEL}
        if hasattr(whole_config, "quantization_config"):
            config.quantization_config = whole_config.quantization_config
    stored, layout = stored_precision(config), layout_of(config, base)
    quantization: Any = getattr(config, "quantization_config", None)
    unpacked = bool(stored) and layout is None and is_unpacked(config, device)
    apart = not stored and quantize is not None and has_experts(config)
    if stored:
        require_method(config, base)
        if not unpacked:
            require_plain(stored, quantize, base)
        if layout is None:
            options |= loading_options(config, device, base)
        else:
            config.quantization_config = {"quant_method": register(), "codes": CODES[layout.name]}
            options["device_map"] = {"": str(device)}
        remedy = remedy_for(config)
        whole = f"the base model {base!r} is stored in {stored} and could not be loaded"
    elif apart:
        config.quantization_config = {"quant_method": register(), "codes": PLAIN}
    tokenizer = load(AutoTokenizer.from_pretrained, f"the tokenizer of the {called}", WHERE_TO_PUT_A_TOKENIZER)
    _require_vocabulary(tokenizer, base)
    models: Any = getattr(transformers, loader)
    model, found = load(
        models.from_pretrained,
        whole,
        remedy,
        config=config,
        dtype="auto",
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are refused below
        adapter_kwargs=NO_ADAPTER,
        **options,
    )
    _require_all_weights(base, found)
    if unpacked and (block := quantization.get("weight_block_size")):
        require_whole_blocks(_weights_of(source), block, base)
    if layout is not None:
        fill(model, _weights_of(source), layout, device, base)
        model.config.quantization_config = quantization
    elif apart:
        no_quantizer(model)
        quantize_apart(model, str(quantize), _weights_of(source), device)
    if stored:
        model.stored_fingerprint = fingerprint_files(config.model_type, _weights_of(source))
    if adapter is not None:
        say(f"an adapter{adapts(adapter)} ({ADAPTER}) lies beside the weights of {base}; it is not applied")
    _say_what_does_not_fit(model, tokenizer, found, base)
    return model, tokenizer


def has_experts(config: Any) -> bool:
    """Whether a model is a mixture of experts, as its settings say."""
    return any("experts" in name and value for name, value in config.get_text_config().to_dict().items())


def no_quantizer(model: Any) -> None:
    """Tells transformers that a model is plain, which it refuses to save while it believes otherwise."""
    del model.config.quantization_config
    model.hf_quantizer = None
    model.quantization_method = None


def fingerprint_of(model: Any) -> str:
    """What a model in memory is known by: of one that was stored quantised, the fingerprint of its files, as when
    ``load_base`` loads it, where they are found and hold its embedding table; else ``fingerprint_model``."""
    given: str = getattr(model, "stored_fingerprint", "")
    if given or not stored_precision(model.config):
        return given or fingerprint_model(model)
    try:
        paths = _weights_of(str(model.config._name_or_path))
        if holds(paths, model.get_input_embeddings().weight):
            return fingerprint_files(model.config.model_type, paths)
    except (OSError, ValueError, KeyError, SafetensorError):  # moved, or never stored
        pass
    return fingerprint_model(model)


def _weights_of(source: str) -> list[Path]:
    """The safetensors files of a model in a folder, or of one on the hub that was downloaded just now."""
    folder = Path(source)
    if not folder.is_dir():
        from transformers.utils import hub as untyped

        hub: Any = untyped
        folder = Path(hub.cached_file(source, "config.json")).parent
    if (folder / INDEX).is_file():
        names = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        return [folder / name for name in sorted(names)]
    return [folder / WEIGHTS]


def _reason(error: Exception) -> str:
    """The first sentence of what a library says went wrong; with the type of an error that no file should cause."""
    sentence = " ".join(str(error).split()).split(". ")[0].rstrip(".")[:200]
    expected = isinstance(error, OSError | ValueError | RuntimeError | ImportError | SafetensorError)
    return sentence if sentence and expected else f"{type(error).__name__}: {sentence}".removesuffix(": ")


def _adapter_beside(source: str, base: str) -> Path | None:
    """The ``adapter_config.json`` in the folder or repository of a whole model; an adapter alone is refused."""
    if Path(source).is_dir():
        path = Path(source, ADAPTER)
        return path if path.is_file() else None
    from transformers.utils import hub as untyped

    hub: Any = untyped

    def find(name: str) -> Path | None:
        silent = {f"_raise_exceptions_for_{kind}": False for kind in ("gated_repo", "missing_entries")}
        try:
            found = hub.cached_file(source, name, **silent, _raise_exceptions_for_connection_errors=False)
        except (OSError, ValueError):  # no such repository: said when its configuration is read
            return None
        return None if found is None else Path(found)

    adapter = find(ADAPTER)
    if adapter is not None and find("config.json") is None:
        raise adapter_alone(adapter, f"{base!r} is")
    return adapter


def _loader(config: Any, base: str) -> str:
    """The class of transformers that loads a model of this configuration: a causal language model, an encoder–decoder
    of text, or a model of images and text. What it computes is not known yet: an encoder may pass here and be refused
    by ``require_causal``."""
    from transformers.models.auto import modeling_auto

    kind, own_code = config.model_type, getattr(config, "auto_map", None) or {}
    if config.is_encoder_decoder:
        what = "encoder-decoder of text"
        known: dict[str, Collection[str]] = {
            "AutoModelForSeq2SeqLM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
        }
    else:
        what = "causal language model"
        known = {
            "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            "AutoModelForImageTextToText": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        }
    for loader, kinds in known.items():
        if kind in kinds or loader in own_code:
            return loader
    raise BaseModelError(
        f"the base model {base!r} is of type {kind}, for which transformers has no {what} (it may be an encoder); "
        f"give a causal language model, such as {DEFAULT_BASE}, or an encoder-decoder, such as T5"
    )


def _require_vocabulary(tokenizer: Any, base: str) -> None:
    """Where its files are missing, transformers makes a tokenizer of special tokens alone, for which all text is
    empty."""
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise BaseModelError(
            f"the base model {base!r} should come with a tokenizer, but no vocabulary was found; "
            f"{WHERE_TO_PUT_A_TOKENIZER}"
        )


def _require_all_weights(base: str, found: dict[str, Any]) -> None:
    """Transformers fills weights that a file lacks, or has in another shape, with random numbers."""
    missing = sorted(found["missing_keys"])
    if missing:
        raise BaseModelError(
            f"the base model {base!r} should hold every weight of its architecture, but {len(missing)} of them, "
            f"such as {missing[0]}, are not there; give a complete language model"
        )
    for name, stored, wanted in sorted(found["mismatched_keys"]):
        raise BaseModelError(
            f"the base model {base!r} should hold {name} as {list(wanted)} by its configuration, but it is "
            f"{list(stored)}; give the config.json that the weights were saved with"
        )


def _say_what_does_not_fit(model: Any, tokenizer: Any, found: dict[str, Any], base: str) -> None:
    unexpected = sorted(
        name
        for name in found["unexpected_keys"]
        if not name.endswith(BUFFERS)
        and not (model.config.model_type == "gemma3n_text" and name.startswith(OTHER_SENSES))
    )
    if unexpected:
        say(
            f"the weights of {base} hold {len(unexpected)} that its architecture has no place for, such as "
            f"{unexpected[0]}; they are left out"
        )
    rows = model.get_input_embeddings().weight.shape[0]
    special = set(tokenizer.all_special_ids) | {
        token for token, added in tokenizer.added_tokens_decoder.items() if added.special
    }  # these cannot come from a text
    beyond = sorted(token for token in tokenizer.get_vocab().values() if token >= rows and token not in special)
    if beyond:
        token = tokenizer.convert_ids_to_tokens(beyond[0])
        say(
            f"the tokenizer of {base} has {len(beyond)} tokens, such as {token!r}, for which the embedding table of "
            f"{rows} rows has none; texts with them are refused"
        )


def _dequantized(gguf: Path, key: str) -> Path:
    """The folder with the GGUF file's model as fp32 safetensors; made on first use, by one process, whole or not at
    all."""
    folder = cache_folder() / "base" / f"{gguf.stem}-{key}"
    if _complete(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not _complete(folder):
                _convert(gguf, folder)
    except (OSError, SafetensorError) as error:  # a full disk is the one or the other
        reason = getattr(error, "strerror", None) or _reason(error)
        raise BaseModelError(
            f"the base model {gguf.name} could not be unpacked into {folder.parent}: {reason}; "
            "free some space there or set SOFTPROMPT_CACHE to another folder"
        ) from error
    return folder


def _complete(folder: Path) -> bool:
    """True if every file has the size that was written down when the folder was made."""
    try:
        sizes = json.loads((folder / "sizes.json").read_text())
        return bool(sizes) and all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def _convert(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers import modeling_gguf_pytorch_utils as untyped
    from transformers.utils import logging

    reader: Any = untyped
    reader.tqdm = logging.tqdm  # the one progress bar that transformers does not let one turn off
    models: Any = AutoModelForCausalLM
    for name in os.listdir(folder.parent):  # what a killed process has left behind
        if name.startswith(f".{folder.name}-"):
            shutil.rmtree(folder.parent / name, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
            model, found = models.from_pretrained(
                str(gguf.parent),
                gguf_file=gguf.name,
                dtype=torch.float32,
                output_loading_info=True,
                adapter_kwargs=NO_ADAPTER,
            )
        except OSError:
            raise
        except Exception as error:
            raise BaseModelError(
                f"{gguf} is no GGUF file that transformers can read ({_reason(error)}); it may be cut off: download it "
                "again, or give another"
            ) from error
        _require_all_weights(str(gguf), found)
        no_quantizer(model)
        model.config._name_or_path = gguf.stem
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        sizes = {file.name: file.stat().st_size for file in sorted(scratch.iterdir())}
        (scratch / "sizes.json").write_text(json.dumps(sizes))
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
