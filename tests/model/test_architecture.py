"""What is read off a model's architecture: its layers, its window, and whether its tokens see those behind them."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from softprompt.errors import BaseModelError
from softprompt.model.architecture import FAMILIES, decoder_layers, window_of
from softprompt.model.fingerprint import model_settings
from softprompt.model.frozen import FrozenLM
from softprompt.model.request import Request
from tests.conftest import ALL, SIZES, make_model, make_tokenizer, randomised, tiny

EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8, "num_local_experts": 8}
ENCODER = {**SIZES, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
XL = {
    "vocab_size": 320,
    "d_model": 32,
    "d_inner": 48,
    "n_layer": 2,
    "n_head": 4,
    "emb_dim": 32,
    "n_layers": 2,
    "n_heads": 4,
}


def config_of(kind: str, **options: Any) -> Any:
    sizes = XL if kind in ("xlm", "xlnet") else SIZES
    return AutoConfig.for_model(kind, **{**sizes, **options})


def model_of(kind: str, **options: Any) -> Any:
    models: Any = AutoModelForCausalLM
    torch.manual_seed(7)
    return models.from_config(config_of(kind, **options))


def frozen(model: Any, name: str = "tiny") -> FrozenLM:
    return FrozenLM(model, make_tokenizer(), name=name, dtype="fp32", device="cpu")


# --- causality -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["bert", "roberta", "electra", "camembert", "ernie", "megatron-bert", "roformer", "xlm", "xlnet"]
)
def test_an_encoder_is_refused(kind: str) -> None:
    model = model_of(kind, **({} if kind in ("xlm", "xlnet") else {**ENCODER, "embedding_size": 32})).eval()
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])
    with torch.no_grad():
        first, second = model(input_ids=ids).logits[:, :3]
    assert not torch.allclose(first, second)  # the fourth token changes what stands before it
    with pytest.raises(BaseModelError) as error:
        frozen(model, "some model")
    assert f"'some model' is an encoder ({kind})" in str(error.value)
    assert str(error.value).endswith("give a causal language model")


def test_attention_in_both_directions_is_refused_whatever_the_model_is_called() -> None:
    options = {"head_dim": 8, "layer_types": ["full_attention"] * 3, "use_bidirectional_attention": True}
    with pytest.raises(BaseModelError, match="its tokens see those behind them"):
        frozen(model_of("gemma3_text", **options))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_causality_is_told_in_every_dtype(dtype: str) -> None:
    for kind in ("llama", "gpt2", "gemma3_text-sliding"):
        FrozenLM(make_model(kind), make_tokenizer(), name=kind, dtype=dtype, device="cpu")
    with pytest.raises(BaseModelError, match="encoder"):
        FrozenLM(model_of("bert", **ENCODER), make_tokenizer(), name="bert", dtype=dtype, device="cpu")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("bert", {**ENCODER, "is_decoder": True}),
        ("mixtral", EXPERTS),
        ("qwen3_moe", EXPERTS),
        ("mamba", {}),
        ("ctrl", {"n_embd": 32, "dff": 48, "n_layer": 2, "n_head": 4, "n_positions": 128}),  # scales its input in place
        ("bloom", {"n_layer": 2, "n_head": 4}),
    ],
)
def test_any_causal_model_passes(kind: str, options: dict[str, Any]) -> None:
    lm = frozen(model_of(kind, **options))
    assert lm.score([Request((60, 61), 0, ((70, 71),))]).isfinite().all()


def test_a_model_that_takes_no_embedded_tokens_is_refused() -> None:
    model = make_model("llama")
    forward = model.forward
    model.forward = lambda input_ids, attention_mask=None: forward(input_ids=input_ids)
    with pytest.raises(BaseModelError) as error:
        frozen(model, "some model")
    assert "'some model' (llama) does not compute logits and gradients from embedded tokens" in str(error.value)


# --- families --------------------------------------------------------------------------------------


def test_every_family_is_one_that_transformers_knows() -> None:
    kinds = [kind for family in FAMILIES for kind in family.model_types]
    assert len(set(kinds)) == len(kinds)
    images = {kind for kind in kinds if kind.endswith("_vl_text")}  # of models that also see images
    assert set(kinds) - images <= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    for family in FAMILIES:
        assert family.name
        assert family.leaves
        assert all(refusal.why for refusal in family.refused)


@pytest.mark.parametrize(
    ("kind", "options", "why"),
    [
        ("llama", {}, ""),
        ("stablelm", {}, "it is of type stablelm"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, ""),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, ""),
        ("gemma3_text", {"head_dim": 8, "final_logit_softcapping": 30.0}, ""),
        ("llama4_text", {"attn_temperature_tuning": True}, ""),
        ("gemma3_text", {"head_dim": 8}, ""),
    ],
)
def test_a_model_that_cannot_share_a_prefix_says_why(kind: str, options: dict[str, Any], why: str) -> None:
    lm = frozen(model_of(kind, **options))
    assert why in lm.why_whole_sequences
    assert lm.shares_prefix == (not why) == (not lm.why_whole_sequences)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {"sliding_window": 4}),  # made from a Mistral; transformers does not look at it
        ("llama", {"sliding_window": 4, "layer_types": ["sliding_attention"] * 3}),
        ("gpt_neox", {"sliding_window": 4}),
        ("mistral", {"sliding_window": 4, "layer_types": ["full_attention"] * 3}),  # all layers slide all the same
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"sliding_window": 4, "use_sliding_window": False}),
        ("qwen2", {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 0}),
        ("qwen2", {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 2}),
        ("qwen3", {"head_dim": 8, "sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1}),
        ("gemma3_text", {"head_dim": 8, "sliding_window": 4, "layer_types": ["full_attention"] * 3}),
        ("gemma3_text", {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention"] * 3}),
    ],
)
def test_windows_are_those_of_transformers_whatever_the_configuration_says(kind: str, options: dict[str, Any]) -> None:
    model = randomised(model_of(kind, **options)).eval()
    ids = (*range(3, 15), 60, 61, 62)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(dim=-1)
    lm = frozen(model)
    assert lm.shares_prefix
    words = tuple((token,) for token in range(320))
    torch.testing.assert_close(lm.score([Request(ids, 9, words)])[0], expected, rtol=1e-4, atol=1e-4)


# --- layers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
def test_the_decoder_layers_of_every_family(kind: str) -> None:
    layers = decoder_layers(make_model(kind))
    assert len(layers) == 3
    assert len({type(layer) for layer in layers}) == 1
    assert any("attn" in name or "attention" in name for name, _ in layers[0].named_modules())


class Block(nn.Module):
    def __init__(self, experts: int) -> None:
        super().__init__()
        self.attention = nn.Linear(4, 4, bias=False)
        self.experts = nn.ModuleList(nn.Linear(4, 6, bias=False) for _ in range(experts))


class Mixture(nn.Module):
    """A model whose experts are modules, more of them than layers, behind a list of as many other parts."""

    def __init__(self, *, layers: int, said: int | None) -> None:
        super().__init__()
        self.vision_tower = nn.ModuleList(nn.Identity() for _ in range(layers))
        self.blocks = nn.ModuleList(Block(8) for _ in range(layers))
        text = SimpleNamespace(num_hidden_layers=said, model_type="mixture")
        self.config = SimpleNamespace(model_type="mixture", get_text_config=lambda: text)


@pytest.mark.parametrize("said", [2, None, 7])
def test_a_layers_experts_are_no_layers(said: int | None) -> None:
    model = Mixture(layers=2, said=said)
    if said != 2:  # where the configuration does not tell, the longest of the outer lists
        model.vision_tower = nn.ModuleList()
    assert decoder_layers(model) is model.blocks


def test_a_token_is_counted_for_the_experts_that_it_is_sent_to(monkeypatch: pytest.MonkeyPatch) -> None:
    # Of attention 2 * 64 for queries and output and 2 * 48 for keys and values, and 2 of 8 experts: 32 + 96 numbers of
    # gates and inputs, 48 + 32 of outputs; 32 + 8 of the router; two copies of 320 logits come on top.
    a_token = 4 * 3 * (2 * 64 + 2 * 48 + 2 * (32 + 96 + 48 + 32) + 32 + 8) + 4 * 2 * 320
    lm = frozen(model_of("mixtral", **EXPERTS))
    lm.device = torch.device("cuda")
    memory = SimpleNamespace(total_memory=10 * a_token * 3000.5)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    assert lm.tokens_at_once == 3000


# --- the window ------------------------------------------------------------------------------------


def test_the_window_is_that_of_the_configuration() -> None:
    assert all(tiny(kind).window == 128 for kind in ALL)


@pytest.mark.parametrize(
    ("settings", "length", "window"),
    [
        ({"n_positions": 512}, 1024, 512),
        ({"seq_length": 2048}, 10**30, 2048),
        ({"max_seq_len": 300}, 10**30, 300),
        ({"max_position_embeddings": -1}, 1024, 1024),  # XLNet
        ({"max_position_embeddings": -1}, 10**30, 32_768),
        ({"max_position_embeddings": None, "n_ctx": 0}, 77, 77),
        ({}, 10**30, 32_768),
        ({}, None, 32_768),
    ],
)
def test_the_window_is_never_without_end(settings: dict[str, Any], length: int | None, window: int) -> None:
    text = SimpleNamespace(**settings)
    config = SimpleNamespace(max_position_embeddings=9, get_text_config=lambda: text)  # of the whole, not of the text
    assert window_of(config, SimpleNamespace(model_max_length=length)) == window


def test_mamba_has_a_window() -> None:
    model = make_mamba()
    assert make_tokenizer().model_max_length > 10**20
    assert frozen(model).window == 32_768


def make_mamba() -> Any:
    models: Any = AutoModelForCausalLM
    return models.from_config(AutoConfig.for_model("mamba", vocab_size=320, hidden_size=32, num_hidden_layers=2))


# --- settings --------------------------------------------------------------------------------------


def settings_of(kind: str = "llama", **options: Any) -> dict[str, Any]:
    return model_settings(config_of(kind, **options))


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}}, "rope_parameters.rope_theta"),
        ({"rms_norm_eps": 1e-3}, "rms_norm_eps"),
        ({"max_position_embeddings": 64}, "max_position_embeddings"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"num_key_value_heads": 4}, "num_key_value_heads"),
    ],
)
def test_a_setting_that_changes_what_is_computed_is_seen(options: dict[str, Any], key: str) -> None:
    before, after = settings_of(), settings_of(**options)
    assert {name for name in before if before[name] != after.get(name)} == {key}


def test_a_sliding_window_is_seen() -> None:
    assert settings_of("mistral", sliding_window=8) != settings_of("mistral", sliding_window=16)


@pytest.mark.parametrize(
    "options",
    [
        {"bos_token_id": 7, "pad_token_id": 0},
        {"dtype": "bfloat16"},
        {"attention_dropout": 0.5, "initializer_range": 0.1},
        {"use_cache": False, "output_hidden_states": True, "return_dict": False},
        {"id2label": {0: "bad", 1: "good"}, "architectures": ["Other"], "name_or_path": "elsewhere"},
        {"unsloth_version": "2026.1", "transformers_version": "5.0.0"},
    ],
)
def test_a_setting_that_changes_nothing_is_not_compared(options: dict[str, Any]) -> None:
    assert settings_of(**options) == settings_of()


def test_settings_are_those_of_the_language_model() -> None:
    text = {**SIZES, "head_dim": 8, "sliding_window": 12}
    whole = AutoConfig.for_model("gemma3", text_config=text)
    found = model_settings(whole)
    assert found["sliding_window"] == 12
    assert found == model_settings(whole.get_text_config())


@pytest.mark.parametrize("kind", [*ALL, "mamba2", "mixtral", "falcon_h1"])
def test_settings_are_json(kind: str) -> None:
    config = make_model(kind).config if kind in ALL else AutoConfig.for_model(kind)
    found = model_settings(config)
    assert len(found) > 5
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_another_release_of_the_configuration_gives_the_same_settings() -> None:
    config = config_of("llama")
    again = type(config).from_dict(json.loads(config.to_json_string()))
    assert model_settings(again) == model_settings(copy.deepcopy(config))


# --- more than an embedding ------------------------------------------------------------------------


def test_tokens_that_are_not_their_embeddings_are_noticed() -> None:
    model = make_model("llama").eval()
    forward = model.forward

    def otherwise(input_ids: Any = None, **options: Any) -> Any:
        if input_ids is not None:
            options["inputs_embeds"] = model.get_input_embeddings()(input_ids) + 0.05
        return forward(**options)

    model.forward = otherwise
    with pytest.raises(BaseModelError, match="more of a token than its embedding"):
        frozen(model)
