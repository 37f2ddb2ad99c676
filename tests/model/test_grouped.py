"""Folders in groups of integer codes (GPTQ, AWQ, AutoRound, compressed-tensors): packed here word by word, as the
formats are published, and read as the weights that the codes stand for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import softprompt as sp
from softprompt.errors import BaseModelError, SoftPromptWarning
from softprompt.model.frozen import FrozenLM
from softprompt.model.quantized import bytes_of
from softprompt.model.request import Request
from softprompt.text.tokens import SOFT
from tests.conftest import make_model, make_tokenizer, toy
from tests.model import families

REQUESTS = [Request((3, SOFT, 5, 9, 11), 2, ((7,), (9, 12)), 0), Request((3, SOFT, 8), 2, ((7,), (20,)), 0)]
SIZE = 16
TURNED = {"llama4_text", "gpt_oss"}
"""Families whose experts a model holds as ``[E, in, out]``."""
Files = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Weight:
    """Codes ``[out, in]`` as integers, scales and the codes of 0 ``[out, groups]``, and the group of each input."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    groups: torch.Tensor

    @property
    def numbers(self) -> torch.Tensor:
        return (self.codes - self.zeros[:, self.groups]) * self.scales[:, self.groups].float()


def words(codes: torch.Tensor, bits: int, order: tuple[int, ...] = ()) -> torch.Tensor:
    """int32 ``[n, ceil(m · bits / 32)]`` of codes ``[n, m]``: the first in the lowest bits, or as ``order`` says."""
    each = 32 // bits
    packed = torch.zeros(len(codes), -(-codes.shape[1] // each), dtype=torch.int64)
    for column in range(codes.shape[1]):
        place = order.index(column % each) if order else column % each
        packed[:, column // each] |= codes[:, column] << bits * place
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).int()


def gptq(bits: int, less: int = 1) -> Callable[[Weight], Files]:
    """As AutoGPTQ writes it: inputs down the rows, and the code of 0 less one, but in the second version."""
    return lambda w: {
        "qweight": words(w.codes, bits).T,
        "qzeros": words(w.zeros.T - less, bits),
        "scales": w.scales.T,
        "g_idx": w.groups.int(),
    }


def awq(w: Weight) -> Files:
    """As AutoAWQ writes it in version GEMM: outputs along the rows, even ones of eight before odd ones."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {"qweight": words(w.codes.T, 4, order), "qzeros": words(w.zeros.T, 4, order), "scales": w.scales.T}


def compressed(bits: int, symmetric: bool) -> Callable[[Weight], Files]:
    """As compressed-tensors writes it: signed codes from the lowest one on."""

    def files(w: Weight) -> Files:
        found = {"weight_packed": words(w.codes, bits), "weight_scale": w.scales}
        found["weight_shape"] = torch.tensor(w.codes.shape)
        if not symmetric:
            found["weight_zero_point"] = words(w.zeros.T, bits).T
        if not torch.equal(w.groups, torch.arange(len(w.groups)) // SIZE):
            found["weight_g_idx"] = w.groups.int()
        return found

    return files


def scheme(bits: int, symmetric: bool = True, **options: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": SIZE}
    group = {"targets": ["Linear"], "weights": weights | options, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


@dataclass(frozen=True)
class Stored:
    """A layout: how a weight is packed, and what ``config.json`` says of it."""

    files: Callable[[Weight], Files]
    config: dict[str, Any]
    bits: int = 4
    symmetric: bool = False
    shuffled: bool = False

    def weight(self, rows: int, columns: int) -> Weight:
        """Made-up codes; of a symmetric layout the middle code stands for 0."""
        count, middle = -(-columns // SIZE), 1 << self.bits - 1
        codes = torch.randint(0, 1 << self.bits, (rows, columns))
        zeros = torch.full((rows, count), middle) if self.symmetric else torch.randint(1, middle + 1, (rows, count))
        scales = (0.1 + torch.rand(rows, count)).half() / (1 << self.bits)
        groups = torch.arange(columns) // SIZE
        return Weight(codes, scales, zeros, groups[torch.randperm(columns)] if self.shuffled else groups)

    def write(self, folder: Path, kind: str = "llama", **sizes: Any) -> dict[str, torch.Tensor]:
        """A tiny model with such weights in all linear layers but the head; returns what the codes stand for."""
        model = make_model(kind, **sizes).half()
        torch.manual_seed(0)
        written, numbers = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
        for name, weight in model.state_dict().items():
            if "_proj" in name and name.endswith(".weight"):
                made = self.weight(*weight.shape)
                numbers[name] = made.numbers
                written |= {name.replace("weight", "") + end: part for end, part in self.files(made).items()}
            elif name != "lm_head.weight" or not model.config.tie_word_embeddings:
                written[name] = weight
        model.config.quantization_config = self.config
        model.config.save_pretrained(folder)
        save_file({n: t.contiguous() for n, t in written.items()}, folder / "model.safetensors", {"format": "pt"})
        make_tokenizer().save_pretrained(folder)
        return numbers

    def write_experts(self, folder: Path, case: str) -> dict[str, torch.Tensor]:
        """The same of a mixture of experts, whose experts the files hold one by one, as older releases of transformers
        did."""
        model = families.make_model(case).half()
        torch.manual_seed(0)
        written, numbers = dict[str, torch.Tensor](), dict[str, torch.Tensor]()

        def packed(place: str, rows: int, columns: int) -> torch.Tensor:
            made = self.weight(rows, columns)
            written.update({f"{place}.{end}": part for end, part in self.files(made).items()})
            return made.numbers

        into, out = {"mixtral": (["w1", "w3"], "w2"), "nemotron_h": (["up_proj"], "down_proj")}.get(
            case, (["gate_proj", "up_proj"], "down_proj")
        )
        for name, weight in model.state_dict().items():
            old = name.replace(".mlp.", ".block_sparse_moe.") if case == "mixtral" else name
            if weight.dim() == 3 and ".experts." in name:
                place, sizes = old.rpartition(".")[0], weight.mT.shape[1:] if case in TURNED else weight.shape[1:]
                parts = [out] if name.endswith(".down_proj") else into
                each = [
                    torch.cat([packed(f"{place}.{i}.{part}", sizes[0] // len(parts), sizes[1]) for part in parts])
                    for i in range(len(weight))
                ]
                numbers[name] = torch.stack([one.T if case in TURNED else one for one in each])
            elif "_proj" in name and name.endswith(".weight") and ".layers." in name:
                numbers[name] = packed(old.removesuffix(".weight"), *weight.shape)
            elif name != "lm_head.weight" or not model.config.tie_word_embeddings:
                written[old] = weight
        model.config.quantization_config = self.config
        model.config.save_pretrained(folder)
        save_file({n: t.contiguous() for n, t in written.items()}, folder / "model.safetensors", {"format": "pt"})
        make_tokenizer().save_pretrained(folder)
        return numbers


def of_gptq(bits: int = 4, **options: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": SIZE, "desc_act": False, "sym": False} | options


ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": SIZE}
OF_AWQ = {"quant_method": "awq", "bits": 4, "group_size": SIZE, "zero_point": True, "version": "gemm"}
LAYOUTS = {
    "gptq": Stored(gptq(4), of_gptq()),
    "gptq-8": Stored(gptq(8), of_gptq(8), bits=8),
    "gptq-2": Stored(gptq(2), of_gptq(2), bits=2),
    "gptq-by-activation": Stored(gptq(4), of_gptq(desc_act=True), shuffled=True),
    "gptq-v2": Stored(gptq(4, less=0), of_gptq(checkpoint_format="gptq_v2")),
    "gptq-v2-by-its-newer-name": Stored(gptq(4, less=0), of_gptq(format="GPTQ_V2")),
    "awq": Stored(awq, OF_AWQ),
    "auto-round": Stored(gptq(4), ROUND | {"packing_format": "auto_round:auto_gptq"}),
    "auto-round-awq": Stored(awq, ROUND | {"packing_format": "auto_round:auto_awq"}),
    "compressed": Stored(compressed(4, True), scheme(4), symmetric=True),
    "compressed-8": Stored(compressed(8, True), scheme(8), bits=8, symmetric=True),
    "compressed-with-zeros": Stored(compressed(4, False), scheme(4, symmetric=False)),
    "compressed-by-activation": Stored(compressed(4, True), scheme(4, actorder="group"), symmetric=True, shuffled=True),
}


def plain(numbers: dict[str, torch.Tensor], case: str = "") -> FrozenLM:
    """The model in fp32 with the weights that the codes stand for."""
    model = families.make_model(case) if case else make_model("llama")
    for weight in model.parameters():
        weight.data = weight.data.half().float()
    assert not model.load_state_dict(numbers, strict=False).unexpected_keys
    return FrozenLM(model, make_tokenizer(), name="plain", dtype="fp32")


def require_same(lm: FrozenLM, oracle: FrozenLM) -> None:
    """Scores by whole sequences and by shared prefixes, and the soft prompt's gradient."""
    found = []
    for model in (lm, oracle):
        soft = 0.1 * torch.randn(6, lm.hidden_size, generator=torch.Generator().manual_seed(0)).requires_grad_()
        scores = model.score_concatenated(REQUESTS, [soft])
        found.append(
            (scores.detach(), *torch.autograd.grad(scores.sum(), soft), model.score(REQUESTS, [soft.detach()]))
        )
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", LAYOUTS)
def test_scores_and_gradient_are_those_of_the_weights_that_the_codes_stand_for(
    tmp_path: Path, name: str, recwarn: pytest.WarningsRecorder
) -> None:
    numbers = LAYOUTS[name].write(tmp_path)
    lm = FrozenLM.load(tmp_path, device="cpu", dtype="fp32")
    assert [str(one.message) for one in recwarn if isinstance(one.message, SoftPromptWarning)] == []
    require_same(lm, plain(numbers))
    for place, weight in numbers.items():
        assert torch.equal(lm.model.get_submodule(place.removesuffix(".weight")).decoded(torch.float32), weight)


@pytest.mark.skipif(find_spec("compressed_tensors") is None, reason="compressed-tensors is not installed")
@pytest.mark.parametrize("name", ["compressed", "compressed-8", "compressed-with-zeros"])
def test_the_library_unpacks_the_same_numbers(tmp_path: Path, name: str) -> None:
    """What is written here is what compressed-tensors reads. It reads no groups by activation any more."""
    from transformers import CompressedTensorsConfig

    numbers = LAYOUTS[name].write(tmp_path)
    models: Any = AutoModelForCausalLM
    unpacked = models.from_pretrained(
        tmp_path, quantization_config=CompressedTensorsConfig(run_compressed=False), dtype=torch.float16
    )
    for place, weight in numbers.items():
        assert torch.equal(unpacked.state_dict()[place].float(), weight.half().float())


def test_a_last_group_that_is_smaller(tmp_path: Path) -> None:
    """Groups of 16 in rows of 40: the third has 8. In rows of 24, three groups of 8 would have the same shape."""
    sizes: Any = {"hidden_size": 40, "intermediate_size": 24, "num_attention_heads": 5, "num_key_value_heads": 5}
    numbers = LAYOUTS["gptq"].write(tmp_path, **sizes)
    lm = FrozenLM.load(tmp_path, device="cpu", dtype="fp32")
    for place, weight in numbers.items():
        assert torch.equal(lm.model.get_submodule(place.removesuffix(".weight")).decoded(torch.float32), weight)


def test_a_bias_is_read_and_one_of_zeros_for_a_layer_without_is_not(tmp_path: Path) -> None:
    LAYOUTS["gptq"].write(tmp_path, attention_bias=True)
    path = tmp_path / "model.safetensors"
    held = load_file(path)
    place = "model.layers.0.self_attn.q_proj"
    held |= {f"{place}.bias": torch.arange(32).half(), "model.layers.0.mlp.up_proj.bias": torch.zeros(48).half()}
    save_file(held, path, {"format": "pt"})
    lm = FrozenLM.load(tmp_path, device="cpu", dtype="fp32")
    assert torch.equal(lm.model.get_submodule(place).bias, torch.arange(32.0))
    assert lm.model.get_submodule("model.layers.0.mlp.up_proj").bias is None
    save_file(held | {"model.layers.0.mlp.up_proj.bias": torch.ones(48).half()}, path, {"format": "pt"})
    with pytest.raises(BaseModelError, match=r"up_proj.*has a bias, and the architecture none"):
        FrozenLM.load(tmp_path, device="cpu", dtype="fp32")


def test_it_is_trained_stored_and_asked_again(tmp_path: Path) -> None:
    LAYOUTS["awq"].write(tmp_path)
    lm = sp.load_model(str(tmp_path), device="cpu")
    assert bytes_of(lm.model) < 0.75 * bytes_of(make_model("llama").half())
    before = {name: weight.clone() for name, weight in lm.model.state_dict().items()}
    prompt = sp.train(lm, toy(32, 0), validation=toy(8, 1), num_virtual_tokens=4, steps=3, batch_size=8)
    assert all(torch.equal(weight, before[name]) for name, weight in lm.model.state_dict().items())
    assert prompt.quantized == "awq 4-bit"
    again = sp.load_model(str(tmp_path), device="cpu")
    assert again.fingerprint == lm.fingerprint
    text = "a great film"
    assert sp.predict(again, prompt, [text])[0] == sp.predict(lm, prompt, [text])[0]


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (of_gptq(3), "gptq with 3 bits"),
        (OF_AWQ | {"version": "gemv"}, "awq with 4 bits in the layout 'gemv'"),
        (of_gptq(checkpoint_format="marlin"), "in the layout 'marlin'"),
        (of_gptq(is_marlin_format=True), "in the layout 'marlin'"),
        (of_gptq(format="gptq_p"), "in the layout 'gptq_p'"),
        (of_gptq(pack_dtype="int16"), "packed in words of 32 bits"),
        (of_gptq(8), r"should hold model.layers.0.*in the layout of gptq 8-bit"),
        (of_gptq(group_size=32), r"should hold model.layers.0.*in the layout of gptq 4-bit"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path: Path, config: dict[str, Any], problem: str) -> None:
    LAYOUTS["gptq"].write(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
    with pytest.raises(BaseModelError, match=f"{problem}.*give .*model that it was made of, and --quantize"):
        FrozenLM.load(tmp_path, device="cpu")


def test_codes_without_a_layer_are_refused(tmp_path: Path) -> None:
    """As of experts, which files hold one by one and a model holds together."""
    LAYOUTS["gptq"].write(tmp_path)
    path = tmp_path / "model.safetensors"
    held = load_file(path)
    held["model.layers.0.mlp.experts.0.up_proj.qweight"] = held["model.layers.0.mlp.up_proj.qweight"].clone()
    save_file(held, path, {"format": "pt"})
    with pytest.raises(BaseModelError, match=r"has none for model.layers.0.mlp.experts.0.up_proj.*and --quantize"):
        FrozenLM.load(tmp_path, device="cpu")


def test_a_configuration_that_promises_codes_is_refused_without_them(tmp_path: Path) -> None:
    model = make_model("llama")
    model.config.quantization_config = of_gptq()
    model.config.save_pretrained(tmp_path)
    save_file({name: weight.clone() for name, weight in model.state_dict().items()}, tmp_path / "model.safetensors")
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(BaseModelError, match=r"none is called \*.qweight; give the config.json"):
        FrozenLM.load(tmp_path, device="cpu")


# --- experts that the files hold one by one -------------------------------------------------------


def decoded(module: Any, turned: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What leads into the experts of a layer, and out of them, as transformers holds it."""
    experts = [module.get_submodule(str(index)) for index in range(4)]
    into = torch.stack([torch.cat([layer.decoded(torch.float32) for layer in one.up]) for one in experts])
    out = torch.stack([one.down.decoded(torch.float32) for one in experts])
    return (into.mT, out.mT) if turned else (into, out)


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("mixtral", "gptq"),
        ("mixtral", "awq"),
        ("qwen3_moe", "gptq-by-activation"),
        ("qwen3_moe", "auto-round-awq"),
        ("qwen3_moe", "compressed"),
        ("deepseek_v3", "compressed-with-zeros"),
        ("glm4_moe", "gptq-8"),
        ("qwen3_next", "awq"),
        ("llama4_text", "compressed"),
        ("nemotron_h", "gptq"),
    ],
)
def test_experts_that_are_stored_one_by_one(
    tmp_path: Path, case: str, name: str, recwarn: pytest.WarningsRecorder
) -> None:
    numbers = LAYOUTS[name].write_experts(tmp_path, case)
    lm = FrozenLM.load(tmp_path, device="cpu", dtype="fp32")
    assert [str(one.message) for one in recwarn if "left out" in str(one.message)] == []
    oracle = plain(numbers, case)
    require_same(lm, oracle)
    assert lm.num_parameters == oracle.num_parameters
    assert bytes_of(lm.model) < bytes_of(oracle.model)
    places = {place.rpartition(".")[0] for place in numbers if ".experts." in place}
    assert places
    for place in places:
        into = next(key for key in numbers if key.startswith(place) and "up_proj" in key)
        found = decoded(lm.model.get_submodule(place), case in TURNED)
        assert torch.equal(found[0], numbers[into])
        assert torch.equal(found[1], numbers[f"{place}.down_proj"])


def with_tensors(folder: Path, **changed: torch.Tensor | None) -> None:
    """Changes the file of a folder; None takes a tensor out."""
    path = folder / "model.safetensors"
    held = {**load_file(path), **changed}
    save_file({name: tensor for name, tensor in held.items() if tensor is not None}, path, {"format": "pt"})


def test_layers_that_the_architecture_leaves_out_are_left_out(tmp_path: Path) -> None:
    """Layers that predict further tokens have experts as well, and are numbered from 0 anew."""
    numbers = LAYOUTS["gptq"].write_experts(tmp_path, "qwen3_next")
    path = tmp_path / "model.safetensors"
    further = {
        name.replace("model.", "mtp.", 1): part + 1 for name, part in load_file(path).items() if ".0.mlp" in name
    }
    assert any(".experts." in name for name in further)
    with_tensors(tmp_path, **further)
    require_same(FrozenLM.load(tmp_path, device="cpu", dtype="fp32"), plain(numbers, "qwen3_next"))


def test_a_layer_that_some_models_of_an_architecture_leave_out_is_read_where_it_belongs_to_the_model(
    tmp_path: Path,
) -> None:
    """GLM-4.5-Air predicts further tokens by layer 46, and GLM-4.5 has 92 layers, and predicts them by the next one."""
    numbers = LAYOUTS["gptq"].write_experts(tmp_path, "glm4_moe")
    kind: Any = type(families.make_model("glm4_moe"))
    assert any(re.search(pattern, "model.layers.46.mlp") for pattern in kind._keys_to_ignore_on_load_unexpected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.1.*"])
        lm = FrozenLM.load(tmp_path, device="cpu", dtype="fp32")
    require_same(lm, plain(numbers, "glm4_moe"))


@pytest.mark.parametrize(
    ("case", "lost"),
    [("mixtral", "block_sparse_moe.experts.3.w1"), ("gpt_oss", ""), ("qwen3_moe", "mlp.experts.3.up_proj")],
)
def test_experts_that_cannot_be_put_together_are_refused(tmp_path: Path, case: str, lost: str) -> None:
    """One is missing; or nothing says which numbers are those of its gate."""
    LAYOUTS["gptq"].write_experts(tmp_path, case)
    if lost:
        with_tensors(
            tmp_path, **{f"model.layers.1.{lost}.{end}": None for end in ("qweight", "qzeros", "scales", "g_idx")}
        )
    with pytest.raises(BaseModelError, match=r"has none for model.layers.\d.*experts.0.*and --quantize"):
        FrozenLM.load(tmp_path, device="cpu")


def test_a_mixture_of_experts_is_trained_stored_and_asked_again(tmp_path: Path) -> None:
    LAYOUTS["awq"].write_experts(tmp_path, "qwen3_moe")
    lm = sp.load_model(str(tmp_path), device="cpu")
    before = {name: weight.clone() for name, weight in lm.model.state_dict().items()}
    assert any(weight.dtype == torch.uint8 and ".experts.2." in name for name, weight in before.items())
    prompt = sp.train(lm, toy(32, 0), validation=toy(12, 1), num_virtual_tokens=4, steps=3, batch_size=8)
    assert all(torch.equal(weight, before[name]) for name, weight in lm.model.state_dict().items())
    again = sp.load_model(str(tmp_path), device="cpu")
    assert again.fingerprint == lm.fingerprint
    assert sp.predict(again, prompt, ["a great film"])[0] == sp.predict(lm, prompt, ["a great film"])[0]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("gptq-by-activation", "g_idx"),
        ("compressed-with-zeros", "weight_zero_point"),
        ("compressed-by-activation", "weight_g_idx"),
    ],
)
def test_a_layer_without_a_part_that_its_layout_has_is_refused(tmp_path: Path, name: str, part: str) -> None:
    """Without it, its codes would be read as other numbers."""
    LAYOUTS[name].write(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({key: held for key, held in load_file(path).items() if not key.endswith(f".{part}")}, path)
    with pytest.raises(BaseModelError, match=f"it has no {part}.*and --quantize"):
        FrozenLM.load(tmp_path, device="cpu")
