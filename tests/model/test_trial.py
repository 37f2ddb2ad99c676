"""Models of families that are not known: which path they are given, against transformers' own forward."""

from __future__ import annotations

import pytest
import torch

from softprompt.errors import SoftPromptWarning
from softprompt.model import architecture
from softprompt.model.frozen import FrozenLM
from softprompt.model.request import Request
from softprompt.text.tokens import SOFT
from tests.conftest import make_tokenizer
from tests.model.families import make_model, whole_score

REQUEST = Request((3, SOFT, 4, 60, 61), 3, ((70, 71), (70, 80), (90,)), 0)
SOME = 0.15 * torch.randn(7, 32, generator=torch.Generator().manual_seed(0))


def unknown(case: str, monkeypatch: pytest.MonkeyPatch, dtype: str = "fp32") -> tuple[FrozenLM, str]:
    """A tiny model as if its family had no record, and what is said of it when it is loaded."""
    monkeypatch.setattr(architecture, "FAMILIES", ())
    with pytest.warns(SoftPromptWarning, match="is of a family that is not known") as told:
        lm = FrozenLM(make_model(case), make_tokenizer(), name="some model", dtype=dtype, device="cpu")
    assert len(told) == 1
    said = str(told[0].message)
    assert "\n" not in said
    assert f"'some model' is of a family that is not known ({case})" in said
    return lm, said


def is_exact(lm: FrozenLM, case: str) -> None:
    expected = [whole_score(case, REQUEST, word, SOME) for word in REQUEST.words]
    torch.testing.assert_close(lm.score([REQUEST], [SOME])[0], torch.stack(expected), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("case", ["olmo2", "qwen3_moe", "bamba"])
def test_it_is_fast_if_a_few_texts_come_out_alike(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, said = unknown(case, monkeypatch)
    assert "shares prefixes" in said
    assert lm.shares_prefix
    assert lm.recurrent == (case == "bamba")
    is_exact(lm, case)


@pytest.mark.parametrize(
    ("case", "why"),
    [
        ("granite", "came out differently"),  # it scales its logits
        ("stablelm", "its prefixes cannot be shared"),
        ("phi3", "its setting sliding_window makes long texts another thing"),  # which no short text shows
        ("llama4_text", "its setting attention_chunk_size"),
        ("nemotron_h", "it has layers of the kind mlp, moe"),
    ],
)
def test_it_runs_whole_sequences_otherwise(case: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("softprompt.model.frozen.WHOLE", {})
    lm, said = unknown(case, monkeypatch)
    assert "runs whole sequences, which is slower" in said
    assert why in said
    assert why in lm.why_whole_sequences
    assert not lm.shares_prefix
    assert lm.model.config._attn_implementation != "softprompt"
    is_exact(lm, case)


@pytest.mark.parametrize(("case", "fast"), [("olmo2", True), ("qwen3_next", True), ("granite", False)])
def test_rounding_is_told_from_another_computation(case: str, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert unknown(case, monkeypatch, "bf16")[0].shares_prefix == fast
