"""Mixtures of experts in codes: the scores and the gradient of transformers' own experts with the weights that the codes
stand for."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from softprompt.model.experts import CodedExperts
from softprompt.model.frozen import FrozenLM
from softprompt.model.quantized import bytes_of
from softprompt.model.request import Request
from softprompt.text.tokens import SOFT
from tests.conftest import make_tokenizer
from tests.model.codes import dense
from tests.model.families import make_model

needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
REQUESTS = [Request((3, SOFT, 5, 9, 11), 2, ((7,), (9, 12)), 0), Request((3, SOFT, 8), 2, ((7,), (20,)), 0)]
TURNED = {"llama4_text", "gpt_oss"}
"""Families whose experts are stored ``[E, in, out]``."""
FUSED = (
    "mixtral qwen2_moe qwen3_moe qwen3_next qwen3_5_moe_text gpt_oss olmoe glm4_moe deepseek_v2 deepseek_v3 granitemoe "
    "granitemoehybrid llama4_text phimoe lfm2_moe nemotron_h dots1"
).split()


def coded(case: str, precision: str, dtype: str = "fp32") -> FrozenLM:
    return FrozenLM(make_model(case), make_tokenizer(), name=f"tiny-{case}", dtype=dtype, quantize=precision)


def with_dense_weights(lm: FrozenLM, case: str) -> FrozenLM:
    """transformers' own model with the weights that the codes of ``lm`` stand for."""
    model = make_model(case)
    for name, module in lm.model.named_modules():
        if isinstance(module, CodedExperts):
            own, turned = model.get_submodule(name), case in TURNED
            into = own.up_proj if hasattr(own, "up_proj") else own.gate_up_proj
            for index in range(len(into)):
                expert = module.get_submodule(str(index))
                up, down = torch.cat([dense(layer) for layer in expert.up]), dense(expert.down)
                into.data[index] = up.T if turned else up
                own.down_proj.data[index] = down.T if turned else down
        elif ".experts." not in name and (hasattr(module, "codes") or type(module).__name__ == "Linear4bit"):
            model.get_submodule(name).weight.data = dense(module)
    return FrozenLM(model, make_tokenizer(), name="dense", dtype="fp32")


def vectors(lm: FrozenLM) -> torch.Tensor:
    return 0.1 * torch.randn(6, lm.hidden_size, generator=torch.Generator().manual_seed(0))


def answers(lm: FrozenLM) -> tuple[torch.Tensor, ...]:
    """Scores by whole sequences and by shared prefixes, and the soft prompt's gradient."""
    soft = vectors(lm).requires_grad_()
    scores = lm.score_concatenated(REQUESTS, [soft])
    return scores.detach(), *torch.autograd.grad(scores.sum(), soft), lm.score(REQUESTS, [soft.detach()])


@pytest.mark.parametrize("case", FUSED)
def test_scores_and_gradient_are_those_of_the_weights_that_the_codes_stand_for(case: str) -> None:
    lm = coded(case, "int8")
    assert not [name for name, weight in lm.model.named_parameters() if weight.dim() == 3 and "experts" in name]
    for ours, oracle in zip(answers(lm), answers(with_dense_weights(lm, case)), strict=True):
        torch.testing.assert_close(ours, oracle, rtol=2e-4, atol=2e-4)
