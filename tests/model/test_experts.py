"""Mixtures of experts in codes: the scores and the gradient of transformers' own experts with the weights that their
codes stand for."""

from __future__ import annotations

import copy
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import softprompt as sp
from softprompt.errors import BaseModelError
from softprompt.methods import peft as by_peft
from softprompt.model.experts import CodedExperts
from softprompt.model.frozen import FrozenLM
from softprompt.model.memory import matrix_ends
from softprompt.model.quantized import bytes_of, coded_layer
from softprompt.model.request import Request
from softprompt.text.tokens import SOFT
from softprompt.tuning.training import Training
from tests import conftest
from tests.conftest import make_tokenizer, toy, toy_task, train_settings
from tests.model.codes import dense
from tests.model.families import make_model, soft

needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
REQUESTS = [Request((3, SOFT, 5, 9, 11), 2, ((7,), (9, 12)), 0), Request((3, SOFT, 8), 2, ((7,), (20,)), 0)]
TURNED = {"llama4_text", "gpt_oss"}
"""Families whose experts are stored ``[E, in, out]``."""
FUSED = [
    *("mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe_text", "gpt_oss", "olmoe", "glm4_moe", "phimoe"),
    *("deepseek_v2", "deepseek_v3", "granitemoe", "granitemoehybrid", "llama4_text", "lfm2_moe", "nemotron_h", "dots1"),
]


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
                expert: Any = module.get_submodule(str(index))
                up, down = torch.cat([dense(layer) for layer in expert.up]), dense(expert.down)
                into.data[index] = up.T if turned else up
                own.down_proj.data[index] = down.T if turned else down
        elif ".experts." not in name and (hasattr(module, "codes") or type(module).__name__ == "Linear4bit"):
            model.get_submodule(name).weight.data = dense(module)
    return FrozenLM(model, make_tokenizer(), name="dense", dtype="fp32")


def answers(lm: FrozenLM) -> tuple[torch.Tensor, ...]:
    """Scores by whole sequences and by shared prefixes, and the soft prompt's gradient."""
    vectors = soft(6).requires_grad_()
    scores = lm.score_concatenated(REQUESTS, [vectors])
    return scores.detach(), *torch.autograd.grad(scores.sum(), vectors), lm.score(REQUESTS, [vectors.detach()])


@pytest.mark.parametrize("case", FUSED)
def test_scores_and_gradient_are_those_of_the_weights_that_the_codes_stand_for(case: str) -> None:
    lm = coded(case, "int8")
    assert experts_of(lm)
    assert not [name for name, weight in lm.model.named_parameters() if weight.dim() == 3 and "experts" in name]
    for ours, oracle in zip(answers(lm), answers(with_dense_weights(lm, case)), strict=True):
        torch.testing.assert_close(ours, oracle, rtol=2e-4, atol=2e-4)


def test_experts_of_a_class_that_transformers_has_not_marked() -> None:
    """Step 3.7, whose numbers within an expert are clamped."""
    library = pytest.importorskip("transformers.models.step3p7.modeling_step3p7")
    sizes = {"num_local_experts": 4, "hidden_size": 32, "moe_intermediate_size": 16, "hidden_act": "silu"}
    plain = conftest.randomised(library.Step3p7Experts(SimpleNamespace(**sizes), swiglu_limit=0.5))
    plain.requires_grad_(False)
    make = partial(coded_layer, precision="int8", device=torch.device("cpu"))
    experts: Any = CodedExperts.of(copy.deepcopy(plain), make)
    for index in range(4):
        expert = experts.get_submodule(str(index))
        plain.gate_up_proj[index], plain.down_proj[index] = dense(expert.up[0]), dense(expert.down)
    chosen, weights = torch.tensor([[0, 1], [3, 1], [1, 2]]), torch.rand(3, 2)
    found = []
    for module in (experts, plain):
        states = 3 * torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        outputs = module(states, chosen, weights)
        found.append((outputs.detach(), *torch.autograd.grad(outputs.square().sum(), states)))
    for ours, oracle in zip(*found, strict=True):
        torch.testing.assert_close(ours, oracle, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", [pytest.param("nf4", marks=needs_bitsandbytes), "int4", "fp8"])
@pytest.mark.parametrize("case", ["mixtral", "gpt_oss"])
def test_in_all_precisions(case: str, precision: str) -> None:
    lm = coded(case, precision)
    for ours, oracle in zip(answers(lm), answers(with_dense_weights(lm, case)), strict=True):
        torch.testing.assert_close(ours, oracle, rtol=2e-4, atol=2e-4)


def experts_of(lm: FrozenLM) -> list[CodedExperts]:
    return [module for module in lm.model.modules() if isinstance(module, CodedExperts)]


def test_it_takes_the_memory_of_codes_and_has_as_many_weights() -> None:
    """Two layers of 4 experts with 32 inputs and outputs, and 48 numbers within."""
    plain, lm, four = (
        FrozenLM(make_model("mixtral"), make_tokenizer(), name="mixtral", dtype="fp32"),
        coded("mixtral", "int8"),
        coded("mixtral", "int4"),
    )
    assert plain.num_parameters == lm.num_parameters == four.num_parameters
    assert sum(map(bytes_of, experts_of(lm))) == 2 * 4 * (96 * (32 + 4) + 32 * (48 + 4))
    assert sum(map(bytes_of, experts_of(four))) == 2 * 4 * (96 * (32 + 4) + 32 * (32 + 4))  # filled up to 64


def test_passes_are_sized_as_those_of_the_plain_model_and_not_captured() -> None:
    sizes = []
    for lm in (FrozenLM(make_model("mixtral"), make_tokenizer(), name="m", dtype="fp32"), coded("mixtral", "int4")):
        assert not lm.plain
        assert not lm.compiles
        sizes.append(matrix_ends(lm.model.model.layers, lm.model.config))
    assert sizes[0] == sizes[1]


def test_no_expert_is_decoded_that_no_token_is_sent_to() -> None:
    experts = experts_of(coded("mixtral", "int8"))[0]
    states, chosen, weights = torch.randn(5, 32), torch.tensor([[0, 3], [3, 0]] + [[0, 3]] * 3), torch.rand(5, 2)
    before = experts(states, chosen, weights)
    for index in (1, 2):
        expert: Any = experts.get_submodule(str(index))
        expert.down.scales.data.fill_(torch.nan)
    assert torch.equal(experts(states, chosen, weights), before)
    assert experts(states[:2], torch.tensor([[1, 2]] * 2), weights[:2]).isnan().all()


def test_a_number_that_no_expert_has_stands_for_none() -> None:
    """As routers of some architectures mask tokens."""
    experts = experts_of(coded("mixtral", "int8"))[0]
    states, weights = torch.randn(3, 32), torch.rand(3, 2)
    found = experts(states, torch.tensor([[0, 4], [4, 4], [2, 1]]), weights)
    alone = experts(states, torch.tensor([[0, 1], [0, 1], [2, 1]]), weights * torch.tensor([[1.0, 0], [0, 0], [1, 1]]))
    torch.testing.assert_close(found, alone)
    assert experts(states[:0], torch.zeros(0, 2, dtype=torch.long), weights[:0]).shape == (0, 32)


def test_no_weight_is_kept_for_the_backward_pass() -> None:
    experts, kept = experts_of(coded("mixtral", "int4"))[0], list[int]()
    states = torch.randn(3, 32, requires_grad=True)

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = experts(states, torch.tensor([[0, 1], [1, 2], [2, 3]]), torch.rand(3, 2))
    assert max(kept) < 4 * 32 * 48  # a weight of an expert in float32
    assert torch.autograd.grad(found.sum(), states)[0].norm() > 0


def test_training_learns_and_changes_no_bit() -> None:
    lm = coded("mixtral", "int4", dtype="bf16")
    before, data = lm.weights_digest(), toy(24, 0)
    training = Training(toy_task(lm, data), data, toy(12, 1), train_settings(lr=0.3))
    losses = [step.loss for step in training]
    training.result()
    assert losses[-1] < losses[0]
    assert training.base_unchanged
    assert lm.weights_digest() == before
    layer: Any = experts_of(lm)[1].get_submodule("2.up.0")
    layer.codes.data[3, 5] ^= 1
    assert lm.weights_digest() != before


def of_blocks() -> Any:
    """A model whose experts have the numbers of Q4_0, but for those of the last layer."""
    sizes = {"intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2}
    model = conftest.make_model("mixtral", **sizes)
    for layer in model.model.layers[:2]:
        for weight in layer.mlp.experts.parameters():
            codes = torch.randint(0, 16, weight.shape)
            codes[..., ::32] = 0  # stands for -8, the furthest from 0, in each block of 32
            weight.data = (codes - 8) * 2.0**-6
    return model


@pytest.mark.parametrize("stored", [False, True])
def test_blocks_of_a_gguf_file_are_kept_and_other_experts_left_alone(tmp_path: Path, stored: bool) -> None:
    if stored:
        of_blocks().save_pretrained(tmp_path)
        make_tokenizer().save_pretrained(tmp_path)
        lm = FrozenLM.load(tmp_path, device="cpu", dtype="fp32", quantize="gguf")
    else:
        lm = FrozenLM(of_blocks(), make_tokenizer(), name="blocks", dtype="fp32", quantize="gguf")
    kept = [any(weight.dtype == torch.uint8 for weight in layer.mlp.parameters()) for layer in lm.model.model.layers]
    assert kept == [True, True, False]
    oracle = FrozenLM(of_blocks(), make_tokenizer(), name="plain", dtype="fp32")
    assert (lm.fingerprint, lm.num_parameters) == (oracle.fingerprint, oracle.num_parameters)
    for ours, wanted in zip(answers(lm), answers(oracle), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)


# --- folders that hold experts one by one ---------------------------------------------------------


def saved(case: str, folder: Path, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Path:
    model = make_model(case).to(dtype)
    model.save_pretrained(folder, **options)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ("mixtral", torch.bfloat16),
        ("qwen3_moe", torch.float32),
        ("deepseek_v3", torch.bfloat16),
        ("nemotron_h", torch.float32),
        ("qwen3_next", torch.bfloat16),
        ("lfm2_moe", torch.bfloat16),
        ("gpt_oss", torch.bfloat16),  # whose files hold them together
        ("qwen3_5_moe_text", torch.float32),
    ],
)
def test_a_folder_is_read_as_its_model_is_quantised(
    tmp_path: Path, case: str, dtype: torch.dtype, recwarn: pytest.WarningsRecorder
) -> None:
    """Its fingerprint is that of the plain model, and the codes are those of the weights in its dtype."""
    folder = saved(case, tmp_path, dtype, max_shard_size="50KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    lm = FrozenLM.load(folder, device="cpu", dtype="fp32", quantize="int4")
    plain = FrozenLM.load(folder, device="cpu", dtype="fp32")
    assert lm.fingerprint == plain.fingerprint
    model: Any = make_model(case)
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    whole = FrozenLM(model, make_tokenizer(), name="whole", dtype="fp32", quantize="int4")
    assert (lm.num_parameters, bytes_of(lm.model)) == (plain.num_parameters, bytes_of(whole.model))
    for ours, oracle in zip(answers(lm), answers(whole), strict=True):
        torch.testing.assert_close(ours, oracle, rtol=2e-4, atol=2e-4)
    assert [str(one.message) for one in recwarn if "left out" in str(one.message)] == []
    assert lm.model.config.to_dict().get("quantization_config") is None


def test_a_folder_lets_its_files_go_and_is_asked_again(tmp_path: Path) -> None:
    folder = saved("qwen3_moe", tmp_path)
    lm = sp.load_model(str(folder), device="cpu", quantize="int8")
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(folder) not in maps.read_text()
    prompt = sp.train(lm, toy(32, 0), validation=toy(12, 1), num_virtual_tokens=4, steps=3, batch_size=8)
    again = sp.load_model(str(folder), device="cpu", quantize="int8")
    assert (prompt.base_fingerprint, prompt.quantized) == (again.fingerprint, "int8")
    assert sp.predict(again, prompt, ["a great film"])[0] == sp.predict(lm, prompt, ["a great film"])[0]


def test_experts_that_files_hold_one_by_one_are_not_put_together(tmp_path: Path) -> None:
    """That could be more than fits into memory."""
    folder, shapes = saved("qwen3_moe", tmp_path), set[tuple[int, ...]]()

    class Watched(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor) and found.device.type == "cpu":
                shapes.add(tuple(found.shape))
            return found

    together = {(4, 32, 32), (4, 32, 16)}
    with Watched():  # type: ignore[no-untyped-call]
        FrozenLM.load(folder, device="cpu", dtype="bf16", quantize="int8")
    assert not shapes & together
    with Watched():  # type: ignore[no-untyped-call]
        FrozenLM.load(folder, device="cpu", dtype="bf16")
    assert shapes & together


@pytest.mark.parametrize("wrong", ["missing", "cut"])
def test_a_folder_whose_experts_are_not_those_of_its_configuration_is_refused(tmp_path: Path, wrong: str) -> None:
    path = saved("qwen3_moe", tmp_path) / "model.safetensors"
    held, name = load_file(path), "model.layers.1.mlp.experts.2.up_proj.weight"
    weight = held.pop(name)
    save_file(held | ({name: weight[:8].clone()} if wrong == "cut" else {}), path, {"format": "pt"})
    with pytest.raises(BaseModelError, match=r"experts.*give "):
        FrozenLM.load(tmp_path, device="cpu", quantize="int8")


@needs_bitsandbytes
def test_adapters_stand_beside_linear_layers_and_not_within_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the plain model, whose experts are no linear layers."""
    peft = pytest.importorskip("peft")
    adapted = dict[str, set[str]]()
    for precision in (None, "nf4"):
        lm = FrozenLM(make_model("qwen2_moe"), make_tokenizer(), name="moe", dtype="fp32", quantize=precision)
        monkeypatch.setattr(by_peft, "learn", lambda problem, lm, *rest: lm)
        problem: Any = SimpleNamespace(fresh=lambda lm=lm: lm, seed=0)
        by_peft.lora(problem)
        adapted[str(precision)] = {n for n, m in lm.model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert adapted["nf4"] == adapted["None"]
    assert any("shared_expert." in name for name in adapted["nf4"])
