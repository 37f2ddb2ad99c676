"""The blocks of GGUF files: the numbers of the library gguf, bit for bit, and what is computed with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from softprompt.errors import BaseModelError
from softprompt.model.coded import BlockLinear
from softprompt.model.frozen import FrozenLM
from softprompt.model.quantized import bytes_of
from softprompt.model.request import Request
from softprompt.text.tokens import SOFT
from tests.conftest import make_model, make_tokenizer
from tests.models_on_disk import write_gguf

gguf = pytest.importorskip("gguf")
REQUESTS = [Request((3, SOFT, 5, 9, 11), 2, ((7,), (9, 12)), 0), Request((3, SOFT, 8), 2, ((7,), (20,)), 0)]


def unpacked(kind: str, shape: tuple[int, int] = (40, 96)) -> torch.Tensor:
    """By the library, of random numbers with a row of zeros, a block of one number, and small and large blocks."""
    numbers = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    numbers[3], numbers[4, :32] = 0, 0.25
    numbers[5] *= 1e-4
    numbers[6] *= 1e3
    kind = gguf.GGMLQuantizationType[kind]
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(numbers, kind), kind))


@pytest.mark.parametrize(("kind", "bits"), [("Q8_0", 8.5), ("Q4_0", 5), ("Q4_1", 5)])
def test_blocks_are_found_again_bit_for_bit(kind: str, bits: float) -> None:
    weight = unpacked(kind)
    layer = BlockLinear.of(weight, None)
    assert layer is not None
    assert torch.equal(layer.decoded(torch.float32), weight)
    assert sum(part.nbytes for part in layer.parameters()) * 8 == bits * weight.numel()
    inputs = torch.randn(3, 96, requires_grad=True)
    found = layer(inputs)
    torch.testing.assert_close(found, inputs @ weight.T)
    (gradient,) = torch.autograd.grad(found.sum(), inputs)
    torch.testing.assert_close(gradient, weight.sum(dim=0).expand(3, -1))


SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q5_1": (0, 2)}
"""Where in the bytes of a block its scales in fp16 stand; in others they stand first."""


LARGEST = {"Q4_K": 6, "Q5_K": 10, "Q6_K": 10, "Q3_K": 8, "Q2_K": 8, "Q5_0": 9, "Q5_1": 10, "IQ4_NL": 9, "IQ4_XS": 9}
"""Bits of a weight in memory at most."""


@pytest.mark.parametrize(("kind", "bits"), LARGEST.items())
def test_blocks_of_any_equal_steps_are_found_bit_for_bit(kind: str, bits: int) -> None:
    """Codes are random bytes, so that steps, signs and scales of all sizes come; weights are below 1."""
    of = gguf.GGMLQuantizationType[kind]
    size, length = gguf.GGML_QUANT_SIZES[of]
    draw = np.random.default_rng(0)
    raw = draw.integers(0, 256, size=(24, 1024 // size, length), dtype=np.uint8)
    for place in SCALES.get(kind, (0,)):
        scales = (draw.random(raw.shape[:2]) * 0.05 / length).astype(np.float16)
        raw[..., place : place + 2] = scales.view(np.uint8).reshape(*raw.shape[:2], 2)
    weight = torch.from_numpy(gguf.quants.dequantize(raw.reshape(24, -1), of))
    layer = BlockLinear.of(weight, None)
    assert layer is not None
    assert torch.equal(layer.decoded(torch.float32), weight)
    assert sum(part.nbytes for part in layer.parameters()) * 8 <= bits * weight.numel()


def test_other_numbers_are_not_taken_for_blocks() -> None:
    assert BlockLinear.of(torch.randn(40, 96), None) is None
    assert BlockLinear.of(torch.randn(40, 90), None) is None
    changed = unpacked("Q8_0")
    changed[7, 3] *= 1 + 2**-20
    assert BlockLinear.of(changed, None) is None


def test_a_gguf_file_answers_as_its_unpacked_model_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its queries' and keys' layers are Q8_0, and rotary pairs are in another order there."""
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "tiny.gguf")
    found = []
    for dtype in ("fp32", "bf16"):
        plain, lm = (FrozenLM.load(tmp_path / "tiny.gguf", dtype=dtype, quantize=how) for how in (None, "gguf"))
        coded = [name for name, module in lm.model.named_modules() if isinstance(module, BlockLinear)]
        assert {name.rpartition(".")[2] for name in coded} == {"q_proj", "k_proj"}
        assert (lm.fingerprint, lm.num_parameters) == (plain.fingerprint, plain.num_parameters)
        assert bytes_of(lm.model) < bytes_of(plain.model)
        vectors = 0.1 * torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
        found.append([model.score(REQUESTS, [vectors]) for model in (plain, lm)])
    torch.testing.assert_close(*found[0])
    torch.testing.assert_close(*found[1], rtol=0, atol=0.02)


def test_what_has_no_blocks_is_refused() -> None:
    with pytest.raises(BaseModelError, match=r"keeps the blocks of GGUF files.*'tiny' has none.*choose int8 or int4"):
        FrozenLM(make_model("llama"), make_tokenizer(), name="tiny", dtype="fp32", quantize="gguf")
