"""Quantised base models: the gradient and scores of the weights that the codes stand for, bits that stay, fingerprints,
and what is refused."""

from __future__ import annotations

import copy
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import softprompt as sp
from softprompt.errors import BaseModelError, ConfigError, PrecisionWarning, SoftPromptWarning
from softprompt.model.coded import CodedLinear
from softprompt.model.frozen import FrozenLM
from softprompt.model.quantized import bytes_of
from softprompt.model.request import Request, Sampling
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.text.tokens import SOFT
from softprompt.tuning.training import Training
from tests.conftest import TOY_LABELS, make_model, make_tokenizer, tiny, toy, toy_task, train_settings
from tests.model.codes import dense

needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
PRECISIONS = (pytest.param("nf4", marks=needs_bitsandbytes), "int8", "int4", "fp8")
REQUESTS = [Request((3, SOFT, 5, 9, 11), 2, ((7,), (9, 12)), 0), Request((3, SOFT, 8), 2, ((7,), (20,)), 0)]


def loaded(precision: str | None, kind: str = "llama", dtype: str = "fp32") -> FrozenLM:
    return FrozenLM(make_model(kind), make_tokenizer(), name=f"tiny-{kind}", dtype=dtype, quantize=precision)


def vectors(lm: FrozenLM) -> torch.Tensor:
    return 0.1 * torch.randn(6, lm.hidden_size, generator=torch.Generator().manual_seed(0))


def with_dense_weights(lm: FrozenLM, kind: str = "llama") -> FrozenLM:
    """A plain model with the weights that the codes of ``lm`` stand for."""
    model = make_model(kind)
    for name, module in list(lm.model.named_modules()):
        if hasattr(module, "codes") or type(module).__name__ == "Linear4bit":
            own = model.get_submodule(name)
            weight = dense(module)
            own.weight.data = weight.T.contiguous() if type(own).__name__ == "Conv1D" else weight
    return FrozenLM(model, make_tokenizer(), name="dense", dtype="fp32")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_scores_and_gradient_are_those_of_the_weights_that_the_codes_stand_for(precision: str, kind: str) -> None:
    lm = loaded(precision, kind)
    plain = with_dense_weights(lm, kind)
    found = []
    for model in (lm, plain):
        soft = vectors(lm).requires_grad_()
        scores = model.score_concatenated(REQUESTS, [soft])
        (gradient,) = torch.autograd.grad(scores.sum(), soft)
        found.append((scores.detach(), gradient, model.score(REQUESTS, [vectors(lm)])))
    for ours, oracle in zip(*found, strict=True):
        torch.testing.assert_close(ours, oracle, rtol=2e-4, atol=2e-4)
    assert not torch.allclose(found[0][0], tiny(kind).score(REQUESTS, [vectors(lm)]), atol=1e-3)  # it is quantised


@pytest.mark.parametrize(
    ("precision", "bound"),
    [("int8", 0.5 / 127), ("int4", 0.51 / 15), ("fp8", 0.5 / 8)],  # e4m3 has 3 bits behind the point
)
def test_codes_are_the_nearest(precision: str, bound: float) -> None:
    lm, plain = loaded(precision), make_model("llama")
    for name, module in lm.model.named_modules():
        if not hasattr(module, "codes"):
            continue
        weight = plain.get_submodule(name).weight.detach()
        error = (dense(module) - weight).abs()
        if precision == "fp8":
            assert (error <= bound * weight.abs() + module.scales * 2**-9).all()
            continue
        reach = weight.abs().amax(dim=1, keepdim=True)
        if precision == "int4":
            reach = (weight.amax(dim=1) - weight.amin(dim=1))[:, None] * (1 + 2**-6)
        assert (error <= bound * reach + 1e-6).all()


def test_a_layer_of_zeros_stays_zero() -> None:
    model = make_model("llama")
    layer = model.model.layers[0].mlp.down_proj
    layer.weight.data.zero_()
    for precision in ("int8", "int4", "fp8"):
        lm = FrozenLM(copy.deepcopy(model), make_tokenizer(), name="zeros", dtype="fp32", quantize=precision)
        assert (dense(lm.model.model.layers[0].mlp.down_proj) == 0).all()


def coded(precision: str, shape: tuple[int, int] = (48, 100)) -> Any:
    torch.manual_seed(0)
    return CodedLinear(0.1 * torch.randn(shape), None, precision)


@pytest.mark.parametrize("precision", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("rows", [1, 3, 17, 60])
@pytest.mark.parametrize(
    ("shape", "packed"), [((48, 128), False), ((48, 128), True), ((48, 100), True), ((7, 33), True)]
)
def test_any_number_of_rows_gives_the_product_in_16_bits(
    precision: str, rows: int, shape: tuple[int, int], packed: bool
) -> None:
    layer = coded(precision, shape)
    if packed:
        layer.packed = layer.lay_out()
        assert (layer.packed is not None) == (precision == "int4" and shape[0] == 48)
    inputs = torch.randn(2, rows, shape[1]).bfloat16().requires_grad_()
    weight = dense(layer)
    exact = inputs.detach().float() @ weight.T
    found = layer(inputs)
    assert float((found.detach().float() - exact).norm() / exact.norm()) < 0.01
    sent = torch.randn(found.shape).bfloat16()
    (gradient,) = torch.autograd.grad(found, inputs, sent)
    exact = sent.float() @ weight
    assert float((gradient.float() - exact).norm() / exact.norm()) < 0.01


def test_every_code_is_the_number_that_it_stands_for() -> None:
    """Of e4m3, all but the two that are none: numbers, and those below the smallest normal one."""
    layer = coded("fp8", (2, 128))
    every = torch.arange(256, dtype=torch.uint8).view(2, 128)
    layer.codes.data = every.view(torch.float8_e4m3fn)
    numbers = every.view(torch.float8_e4m3fn).float()
    real = numbers.isfinite()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert torch.equal(layer.numbers(dtype).float()[real], numbers[real])
    four = coded("int4", (4, 128))
    four.codes.data = every.view(4, 64)
    expected = torch.stack([every % 16, every // 16], dim=-1).view(4, 2, 64).float()
    assert torch.equal(four.numbers(torch.bfloat16).float(), expected)


def test_in_fp16_sums_of_codes_do_not_overflow() -> None:
    layer = coded("int8", (8, 4096))
    inputs = torch.full((20, 4096), 8.0).half()
    exact = inputs.float() @ dense(layer).T
    torch.testing.assert_close(layer(inputs).float(), exact, rtol=0.01, atol=0.3)


def test_the_stored_weights_are_let_go(tmp_path: Path) -> None:
    """A file stays mapped as long as one of its tensors is used; so do all of its pages."""
    make_model("llama").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    lm = FrozenLM.load(tmp_path, device="cpu", dtype="fp32", quantize="int8")
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("not Linux")
    assert str(tmp_path) not in maps.read_text()
    whole = FrozenLM.load(tmp_path, device="cpu", dtype="fp32")
    assert str(tmp_path) in maps.read_text()  # as it is without
    assert whole.fingerprint == lm.fingerprint


@pytest.mark.parametrize("precision", PRECISIONS)
def test_training_learns_and_changes_no_bit(precision: str) -> None:
    lm = loaded(precision, dtype="bf16")
    before, data = lm.weights_digest(), toy(24, 0)
    training = Training(toy_task(lm, data), data, toy(12, 1), train_settings(lr=0.3))
    losses = [step.loss for step in training]
    soft_prompt = training.result()
    lm.score(REQUESTS, [vectors(lm)])  # passes without a gradient have another layout in bitsandbytes
    assert losses[-1] < losses[0]
    assert training.base_unchanged
    assert lm.weights_digest() == before
    assert (soft_prompt.quantized, soft_prompt.base_fingerprint) == (precision, tiny("llama").fingerprint)


def test_every_bit_counts() -> None:
    lm = loaded("int4")
    layer: Any = lm.model.model.layers[1].mlp.up_proj
    digests = {lm.weights_digest()}
    layer.codes.data[3, 5] ^= 1
    digests.add(lm.weights_digest())
    layer.scales.data[3, 0, 0] *= 2
    digests.add(lm.weights_digest())
    assert len(digests) == 3


@needs_bitsandbytes
def test_the_scales_of_bitsandbytes_count() -> None:
    lm = loaded("nf4")
    before = lm.weights_digest()
    lm.model.model.layers[1].mlp.up_proj.weight.quant_state.absmax[0] += 1
    assert lm.weights_digest() != before


def test_it_takes_less_memory_and_has_as_many_weights() -> None:
    plain, lm = tiny("llama"), loaded("int8")
    assert lm.num_parameters == plain.num_parameters
    linear = sum(m.weight.numel() for m in plain.model.model.layers.modules() if isinstance(m, nn.Linear))
    rows = sum(m.weight.shape[0] for m in plain.model.model.layers.modules() if isinstance(m, nn.Linear))
    assert bytes_of(plain.model) - bytes_of(lm.model) == 3 * linear - 4 * rows
    coded = [m for m in loaded("int4").model.modules() if hasattr(m, "codes")]
    four = sum(m.codes.nbytes + m.scales.nbytes + m.offsets.nbytes for m in coded)
    assert four == sum(m.out_features * -(-m.in_features // 64) * (32 + 4) for m in coded)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_text_is_that_of_the_dense_weights(precision: str) -> None:
    lm = loaded(precision)
    greedy = Sampling(max_new_tokens=8)
    texts = [
        sp.predict(model, made(model), ["film", "bad year"], sampling=greedy) for model in (lm, with_dense_weights(lm))
    ]
    assert [one.text for one in texts[0]] == [one.text for one in texts[1]]


def made(lm: FrozenLM, *, labels: bool = False) -> SoftPrompt:
    return SoftPrompt(
        vectors=vectors(lm),
        name="films",
        base=lm.name,
        base_fingerprint=lm.fingerprint,
        tokenizer_fingerprint=lm.tokenizer_fingerprint,
        template="{soft_prompt}{input} {target}",
        verbalizer=dict(TOY_LABELS.words) if labels else None,
        base_settings=lm.settings,
        quantized=lm.quantized,
    )


def test_the_server_answers_as_predict_does() -> None:
    lm = loaded("int8")
    prompt = made(lm, labels=True)
    asked = {"model": "films", "messages": [{"role": "user", "content": "a great film"}]}
    running = sp.serve(lm, {"films": prompt}, port=0, block=False)
    try:
        reply = httpx.post(f"{running.url}/v1/chat/completions", json=asked, timeout=30)
        assert reply.status_code == 200, reply.text
        answer = reply.json()["choices"][0]["message"]["content"]
    finally:
        running.close()
    assert answer == sp.predict(lm, prompt, "a great film")[0].text


# --- one soft prompt, several precisions ----------------------------------------------------------


def test_another_precision_is_told_and_another_model_refused() -> None:
    plain, lm = tiny("llama"), loaded("int8")
    with pytest.warns(PrecisionWarning, match=r"trained on its base model int8.* used on it unquantised.*--on int8`"):
        sp.predict(plain, made(lm, labels=True), "film")
    with pytest.warns(PrecisionWarning, match=r"trained on its base model unquantised.* used on it int8.*--on int8`"):
        sp.predict(lm, made(plain, labels=True), "film")
    with pytest.raises(BaseModelError, match="fingerprint"):
        sp.predict(tiny("qwen3"), made(lm, labels=True), "film")


def test_the_same_precision_is_not_told(recwarn: pytest.WarningsRecorder) -> None:
    lm = loaded("int8")
    sp.predict(lm, made(lm, labels=True), "film")
    assert not [one for one in recwarn if one.category is PrecisionWarning]


def test_the_file_remembers_it_and_files_without_it_load(tmp_path: Path) -> None:
    for precision in ("int8", ""):
        soft_prompt = made(loaded(precision or None))
        soft_prompt.save(tmp_path / "films.safetensors")
        assert SoftPrompt.load(tmp_path / "films.safetensors").quantized == precision
        assert (b"quantized" in (tmp_path / "films.safetensors").read_bytes()) == bool(precision)


def test_a_run_is_not_gone_on_with_in_another_precision(tmp_path: Path) -> None:
    data = toy(12, 0)
    steps = iter(
        Training(toy_task(loaded("int8"), data), data, data, train_settings(checkpoint_every=1), folder=tmp_path)
    )
    for _ in range(6):
        next(steps)
    del steps
    with pytest.raises(ConfigError, match=r"quantized.*--quantize int8"):
        Training(toy_task(tiny("llama"), data), data, data, train_settings(), folder=tmp_path, resume=True)


# --- what is stored quantised ---------------------------------------------------------------------


def stored(folder: Path, **options: Any) -> Path:
    """The tiny model as bitsandbytes saves it."""
    from transformers import BitsAndBytesConfig

    plain = folder / "plain"
    make: Any = BitsAndBytesConfig
    models: Any = AutoModelForCausalLM
    make_model("llama").save_pretrained(plain)
    model = models.from_pretrained(plain, quantization_config=make(**options), device_map={"": "cpu"})
    model.save_pretrained(folder / "stored")
    make_tokenizer().save_pretrained(folder / "stored")
    return folder / "stored"


@needs_bitsandbytes
@pytest.mark.parametrize(
    ("options", "precision"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, "nf4"),
        ({"load_in_8bit": True}, "int8"),
    ],
)
def test_a_folder_that_is_quantised(
    tmp_path: Path, options: dict[str, Any], precision: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = stored(tmp_path, **options)
    lm, rounded = FrozenLM.load(folder), FrozenLM.load(folder, dtype="bf16")
    assert (lm.quantized, lm.precision) == (precision, precision)
    assert lm.fingerprint == rounded.fingerprint != tiny("llama").fingerprint
    assert lm.num_parameters == tiny("llama").num_parameters
    before = lm.weights_digest()
    soft = vectors(lm).requires_grad_()
    scores = lm.score_concatenated(REQUESTS, [soft])
    (gradient,) = torch.autograd.grad(scores[0, 0], soft)
    shared = lm.score(REQUESTS, [vectors(lm)])
    assert lm.weights_digest() == before
    torch.testing.assert_close(shared, scores.detach(), atol=2e-2, rtol=0)
    assert gradient.norm() > 0
    plain = tiny("llama").score(REQUESTS, [vectors(lm)])
    assert (shared - plain).abs().max() < (0.2 if precision == "int8" else 1.5)
    assert "MatMul8bitLt" not in caplog.text
    if precision == "nf4":
        torch.testing.assert_close(scores, with_dense_weights(lm).score_concatenated(REQUESTS, [soft]))
        wrapped = FrozenLM.wrap(lm.model, make_tokenizer())
        torch.testing.assert_close(wrapped.score(REQUESTS, [vectors(lm)]), shared)


@needs_bitsandbytes
def test_one_that_is_loaded_already_is_the_same_base_model(tmp_path: Path) -> None:
    """But one whose table was changed since is not."""
    models: Any = AutoModelForCausalLM
    folder = stored(tmp_path, load_in_4bit=True, bnb_4bit_quant_type="nf4")
    first, second, third = (models.from_pretrained(folder, device_map={"": "cpu"}) for _ in range(3))
    loaded_here = FrozenLM.load(folder).fingerprint
    assert FrozenLM.wrap(first, make_tokenizer()).fingerprint == loaded_here
    second.get_input_embeddings().weight.data[3] += 1
    assert FrozenLM.wrap(second, make_tokenizer()).fingerprint != loaded_here
    third.config._name_or_path = str(tmp_path / "elsewhere")
    assert FrozenLM.wrap(third, make_tokenizer()).fingerprint != loaded_here


@needs_bitsandbytes
def test_a_quantised_model_is_not_quantised_again(tmp_path: Path) -> None:
    folder = stored(tmp_path, load_in_4bit=True, bnb_4bit_quant_type="nf4")
    with pytest.raises(BaseModelError, match=r"stored in nf4 and cannot be quantised to int8; leave --quantize out"):
        FrozenLM.load(folder, quantize="int8")
    assert FrozenLM.load(folder, quantize="nf4").quantized == "nf4"


FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
"""The numbers of e2m1; the fourth bit is the sign."""


def packed(folder: Path, method: str, width: int = 256) -> dict[str, torch.Tensor]:
    """Writes a tiny model in a format, by hand; returns the weights that its codes stand for."""
    model = make_model("llama", hidden_size=128, intermediate_size=width)
    options: dict[str, Any] = {"activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    if method == "mxfp4":
        sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 16}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320, "sliding_window": 6}
        sizes |= {"num_local_experts": 2, "num_experts_per_tok": 1, "pad_token_id": 0, "eos_token_id": 1}
        models: Any = AutoModelForCausalLM
        model = models.from_config(AutoConfig.for_model("gpt_oss", **sizes)).bfloat16()
        options = {"modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    written, stands_for = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    torch.manual_seed(0)
    for name, weight in model.state_dict().items():
        if method == "mxfp4" and weight.dim() == 3:  # [experts, in, out]; each has a scale for 32 of in
            experts, inner, outer = weight.shape
            codes = torch.randint(0, 16, (experts, outer, inner // 32, 32))
            exponents = torch.randint(118, 124, (experts, outer, inner // 32))
            numbers = FP4[codes % 8] * (1 - 2 * (codes // 8)) * torch.exp2(exponents - 127.0)[..., None]
            stands_for[name] = numbers.view(experts, outer, inner).transpose(1, 2)
            written[f"{name}_blocks"] = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
            written[f"{name}_scales"] = exponents.to(torch.uint8)
        elif method == "fp8" and "_proj" in name:
            codes = (50 * torch.randn(weight.shape)).to(torch.float8_e4m3fn)
            scales = 2.0 ** -torch.randint(9, 11, [-(-size // 128) for size in weight.shape])
            blocks = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
            stands_for[name] = codes.float() * blocks[: len(weight), : weight.shape[1]]
            written |= {name: codes, f"{name}_scale_inv": scales}
        else:
            written[name] = weight.bfloat16().contiguous()
    if model.config.tie_word_embeddings:
        del written["lm_head.weight"]
    model.config.quantization_config = {"quant_method": method, **options}
    model.config.save_pretrained(folder)
    save_file(written, folder / "model.safetensors", metadata={"format": "pt"})
    make_tokenizer().save_pretrained(folder)
    return stands_for


@pytest.mark.parametrize("method", ["mxfp4", "fp8"])
def test_what_needs_a_gpu_is_unpacked_on_a_cpu_and_may_be_quantised_anew(tmp_path: Path, method: str) -> None:
    stands_for = packed(tmp_path, method)
    with pytest.warns(SoftPromptWarning) as told:
        lm = FrozenLM.load(tmp_path, device="cpu")
    assert [str(one.message) for one in told if "unpacked to 16 bits" in str(one.message)] == [
        f"the weights of {tmp_path} are unpacked to 16 bits: the products of {method.upper()} weights need a CUDA GPU, "
        "and the device is cpu"
    ]
    assert [str(one.message) for one in told if "says" in str(one.message) and "RoPE" not in str(one.message)] == []
    found = lm.model.state_dict()
    assert stands_for
    for name, weight in stands_for.items():
        assert torch.equal(found[name].float(), weight.bfloat16().float())
    soft = vectors(lm).requires_grad_()
    (gradient,) = torch.autograd.grad(lm.score_concatenated(REQUESTS, [soft])[0, 0], soft)
    assert gradient.norm() > 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = FrozenLM.load(tmp_path, device="cpu", quantize="int8")
    assert (again.quantized, again.fingerprint) == ("int8", lm.fingerprint)


def test_parts_of_blocks_are_refused(tmp_path: Path) -> None:
    """Transformers takes the block's size for the weight's divided by the number of scales."""
    packed(tmp_path, "fp8", width=192)
    with pytest.raises(BaseModelError, match=r"do not divide its model.*192.*give the model that it was made of"):
        FrozenLM.load(tmp_path, device="cpu")


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    model = make_model("llama")
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace("{", '{"quantization_config": {"quant_method": "runes"},', 1))
    with pytest.raises(BaseModelError, match=r"quantised by 'runes'.*does not know"):
        FrozenLM.load(tmp_path)


def test_a_format_without_its_library_says_what_to_install(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(
        path.read_text().replace("{", '{"quantization_config": {"quant_method": "quanto", "weights": "int4"},', 1)
    )
    with pytest.raises(BaseModelError, match=r"stored in quanto and could not be loaded: .*pip install optimum-quanto"):
        FrozenLM.load(tmp_path)


# --- what is refused ------------------------------------------------------------------------------


class Inference(nn.Linear):
    """A layer whose kernel has no backward pass, as some libraries have."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__(like.in_features, like.out_features, bias=False)
        self.codes = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
        self.weight = like.weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs.detach())


def test_layers_without_a_gradient_are_refused() -> None:
    model = make_model("llama")
    for layer in model.model.layers:  # the gradient would go around them, along the residual stream
        layer.mlp.up_proj = Inference(layer.mlp.up_proj)
    with pytest.raises(BaseModelError, match=r"\(Inference\) have no gradient"):
        FrozenLM(model, make_tokenizer(), name="frozen kernels", dtype="fp32")


def test_an_unknown_precision_and_a_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="--quantize must be one of nf4, int8, int4, fp8, gguf, not 'int3'"):
        loaded("int3")
    monkeypatch.setattr("softprompt.model.quantized.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'bitsandbytes, which is not installed; pip install "softprompt\[nf4\]"'):
        loaded("nf4")


def test_few_linear_layers_are_told() -> None:
    """As of experts that are held together in a way of their own."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "kv_channels": 8, "vocab_size": 320}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    config = AutoConfig.for_model("jetmoe", **sizes, **experts, pad_token_id=0, bos_token_id=1, eos_token_id=1)
    models: Any = AutoModelForCausalLM
    with pytest.warns(SoftPromptWarning, match=r"are linear layers, which are int8 now; the others, such as experts"):
        FrozenLM(models.from_config(config), make_tokenizer(), name="experts", dtype="fp32", quantize="int8")


def test_the_ten_lines_take_it() -> None:
    lm = sp.load_model(make_model("llama"), make_tokenizer(), quantize="int8", name="own")
    assert "int8, computed in float32" in repr(lm)
    assert lm.fingerprint == tiny("llama").fingerprint
