"""Products of fp8 codes, as on a GPU that multiplies them: PyTorch's kernel does the same on a CPU."""

from __future__ import annotations

import pytest
import torch

from softprompt.model.coded import CodedLinear
from softprompt.model.fast import fp8
from softprompt.model.frozen import FrozenLM
from softprompt.model.request import Request
from softprompt.text.tokens import SOFT
from tests.conftest import make_model, make_tokenizer

HALF_STEP = 2**-4
"""Of e4m3, with 3 bits behind the point: the most that a normal number moves, as a share of it."""


def layer(rows: int = 48, columns: int = 32, *, bias: bool = False) -> CodedLinear:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator) * torch.logspace(-2, 1, rows)[:, None]
    made = CodedLinear(weight, torch.arange(rows).float() if bias else None, "fp8")
    made.by_codes = True
    return made


def inputs(width: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Rows of very different sizes, one of zeros; with a few columns far larger than the others."""
    numbers = torch.randn(2, 4, width, generator=torch.Generator().manual_seed(1))
    numbers[..., 3] *= 30
    numbers[1, 2] = 0
    return (numbers * torch.tensor([1e-3, 1, 50, 1000])[:, None]).to(dtype)


def bound(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """How far ``left @ right`` moves at most where each row of ``left`` is rounded to e4m3 by its largest number, the
    smallest of which are multiples of 2^-9, and the product to bfloat16."""
    reach = left.abs().amax(dim=-1, keepdim=True) / 448
    moved = left.abs() * HALF_STEP + reach * 2**-10
    return moved @ right.abs() * 1.01 + (left @ right).abs() * 2**-8 + 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_outputs_and_gradients_are_within_fp8s_error_of_the_decoded_weights(dtype: torch.dtype, bias: bool) -> None:
    own = layer(bias=bias)
    given = (inputs(32, dtype) / 100).requires_grad_()
    weight = own.decoded(torch.float32)
    expected = given.detach().float() @ weight.T
    found = own(given)
    assert found.dtype == dtype
    moved = found.detach().float() - expected - (torch.arange(48.0) if bias else 0)
    slack = 0.5 if bias else 0  # adding the bias rounds once more, to 3 digits of at most 47 and the product
    assert bool((moved.abs() <= bound(given.detach().float(), weight.T) + slack + found.detach().abs() * 2**-8).all())
    if not bias:
        assert float(moved.norm() / expected.norm()) < 0.04
        assert float(moved.norm()) > 0  # the inputs are rounded

    gradient = inputs(48, dtype) / 100
    (passed,) = torch.autograd.grad(found, given, gradient)
    assert passed.dtype == dtype
    scaled = gradient.float() * own.scales.view(1, -1)
    moved = passed.float() - gradient.float() @ weight
    assert bool((moved.abs() <= bound(scaled, own.codes.float()) + passed.abs() * 2**-8).all())
    assert float(moved.norm() / (gradient.float() @ weight).norm()) < 0.04


def test_no_row_changes_another() -> None:
    own, given = layer(), inputs(32)
    alone = torch.stack([own(row[None])[0] for row in given.flatten(0, 1)]).view(2, 4, 48)
    assert torch.equal(own(given), alone)


def test_numbers_of_32_bits_are_not_rounded() -> None:
    own, given = layer(), inputs(32, torch.float32)
    torch.testing.assert_close(own(given), given @ own.decoded(torch.float32).T)


def test_only_large_layers_of_devices_that_multiply_codes_do(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.zeros(2048, 2048, dtype=torch.bfloat16)
    assert not CodedLinear(weight, None, "fp8").by_codes  # a CPU
    monkeypatch.setattr(fp8, "multiplies_fp8", lambda device: True)
    assert CodedLinear(weight, None, "fp8").by_codes
    assert not CodedLinear(weight, None, "int8").by_codes
    assert not CodedLinear(weight[:2047], None, "fp8").by_codes
    assert not CodedLinear(weight[:1024], None, "fp8").by_codes


@pytest.mark.parametrize(("capability", "expected"), [((8, 0), False), ((8, 9), True), ((9, 0), True), ((12, 0), True)])
def test_devices_that_multiply_codes(
    capability: tuple[int, int], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert fp8.multiplies_fp8(torch.device("cuda")) is expected
    assert not fp8.multiplies_fp8(torch.device("cpu"))


def test_loss_and_gradient_of_a_model_stay_close(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds on a tiny model of random weights, in bf16: 0.1 nats a word (of 7 and more), and the gradient stays."""
    requests = [Request((3, SOFT, *range(5, 5 + n)), 2, ((7,), (9, 12)), 0) for n in (2, 9, 30)]
    soft, found = 0.1 * torch.randn(6, 32, generator=torch.Generator().manual_seed(0)), []
    monkeypatch.setattr(fp8, "LEAST_WEIGHTS", 0)
    for by_codes in (False, True):
        monkeypatch.setattr(fp8, "multiplies_fp8", lambda device, by_codes=by_codes: by_codes)
        lm = FrozenLM(make_model("llama"), make_tokenizer(), name="tiny", dtype="bf16", quantize="fp8")
        own = [module.by_codes for module in lm.model.modules() if isinstance(module, CodedLinear)]
        assert own
        assert set(own) == {by_codes}
        before, leaf = lm.weights_digest(), soft.clone().requires_grad_()
        scores = lm.score_concatenated(requests, [leaf])
        (gradient,) = torch.autograd.grad(scores.sum(), leaf)
        assert lm.weights_digest() == before
        found.append((scores.detach(), gradient))
    (decoded, expected), (codes, gradient) = found
    assert not torch.equal(decoded, codes)
    assert float((decoded - codes).abs().mean()) < 0.1
    assert float(torch.cosine_similarity(gradient.flatten(), expected.flatten(), dim=0)) > 0.99
