"""Encoder–decoders: scores, gradients and texts are those of transformers' own forward and ``generate``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from softprompt.data.example import Dataset, Example
from softprompt.errors import BaseModelError, ConfigError, TemplateError
from softprompt.generation.decoder import Decoder, continuation, generate
from softprompt.generation.writer import Writer
from softprompt.model.frozen import FrozenLM
from softprompt.model.request import Request, Sampling
from softprompt.tasks.task import Task
from softprompt.text.template import Template
from softprompt.text.tokens import SOFT
from softprompt.text.verbalizer import Verbalizer
from softprompt.tuning.gradients import Gradients
from softprompt.tuning.objective import Objective
from softprompt.tuning.start import initial_vectors
from softprompt.tuning.training import Training
from tests.conftest import toy, toy_task, train_settings
from tests.encoder_decoders import KINDS, encoder_decoder, make_encoder_decoder, reference, tokenizer_of

TOLERANCE: Any = {"atol": 2e-5, "rtol": 2e-5}
FIRST = Request((SOFT, 40, 41, 42, 43, 44, 45, 46, 1), 1, ((50, 1), (50, 51, 1), (52, 1), (53,)), 0)
INSIDE = Request((40, 41, SOFT, 42, 43, 1), 0, ((60, 61, 62, 1), (60, 61, 1)), 1)
BARE = Request((70, 71, 1), 0, ((72, 73, 1),), None)
REQUESTS = (FIRST, INSIDE, BARE)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def soft_prompts() -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    return [torch.randn(3, 32, generator=draw), torch.randn(5, 32, generator=draw)]


def embedded(kind: str, request: Request, prompts: Sequence[torch.Tensor]) -> torch.Tensor:
    """A request's input ``[1, T, H]`` by transformers' own table."""
    lookup = reference(kind).get_input_embeddings()
    pieces: list[torch.Tensor] = []
    for token in request.ids:
        if token == SOFT:
            assert request.prompt is not None
            pieces.append(prompts[request.prompt])
        else:
            pieces.append(lookup(torch.tensor([token])))
    return torch.cat(pieces)[None]


def own_score(kind: str, request: Request, word: Sequence[int], prompts: Sequence[torch.Tensor]) -> torch.Tensor:
    """log P(word | input), by transformers' own forward with labels: its loss is the mean over their tokens."""
    start = encoder_decoder(kind).decoder_start
    if len(start) == 1:
        labels = torch.tensor([word])
        inputs: dict[str, Any] = {"decoder_attention_mask": torch.ones_like(labels)}
    else:  # the first label is what the tokenizer puts before a target, which is given
        inputs = {"decoder_input_ids": torch.tensor([[*start, *word[:-1]]])}
        labels = torch.tensor([[-100] * (len(start) - 1) + list(word)])
    loss: torch.Tensor = reference(kind)(inputs_embeds=embedded(kind, request, prompts), labels=labels, **inputs).loss
    return -loss * len(word)


def test_scores_are_those_of_transformers_in_any_company(kind: str) -> None:
    lm, prompts = encoder_decoder(kind), soft_prompts()
    scores = lm.score(REQUESTS, prompts)
    for row, request in enumerate(REQUESTS):
        alone = lm.score([request], prompts)[0]
        torch.testing.assert_close(scores[row, : len(request.words)], alone, **TOLERANCE)
        assert bool((scores[row, len(request.words) :] == -torch.inf).all())
        for word, score in zip(request.words, alone, strict=True):
            torch.testing.assert_close(score, own_score(kind, request, word, prompts), **TOLERANCE)


def test_the_gradient_is_that_of_transformers(kind: str) -> None:
    lm = encoder_decoder(kind)
    requests = [Request((SOFT, 40, 41, 42, 1), 1, ((50, 51, 1),), 0), Request((43, SOFT, 44, 1), 0, ((52, 1),), 0)]
    ours = soft_prompts()[0].requires_grad_()
    loss, _ = Gradients(lm).backward(Objective(), requests, [0, 0], ours)
    theirs = soft_prompts()[0].requires_grad_()
    total = -sum(own_score(kind, request, request.words[0], [theirs]) for request in requests) / 5
    assert isinstance(total, torch.Tensor)
    total.backward()  # type: ignore[no-untyped-call]
    assert loss == pytest.approx(float(total.detach()), rel=1e-5)
    torch.testing.assert_close(ours.grad, theirs.grad, **TOLERANCE)


def test_greedy_texts_are_those_of_generate(kind: str) -> None:
    lm, prompts, model = encoder_decoder(kind), soft_prompts(), reference(kind)
    start, found = lm.decoder_start, generate(lm, REQUESTS, prompts, Sampling(max_new_tokens=10))
    for request, ours in zip(REQUESTS, found, strict=True):
        given = embedded(kind, request, prompts)
        theirs = model.generate(
            inputs_embeds=given,
            attention_mask=torch.ones(given.shape[:2], dtype=torch.long),
            decoder_input_ids=torch.tensor([start]),
            max_new_tokens=11,  # BART's settings have the last one forced to end the text
            do_sample=False,
            num_beams=1,
        )[0, len(start) :].tolist()
        ended = theirs.index(1) if 1 in theirs[:10] else 10
        assert ours.ids == tuple(theirs[:ended])
        assert ours.finish == ("stop" if ended < 10 else "length")


def test_rows_join_and_leave_without_a_change() -> None:
    lm, prompts, sampling = encoder_decoder("bart"), soft_prompts(), Sampling(max_new_tokens=8)

    def row(request: Request, most: int) -> Any:
        writer = Writer(lm.tokenizer, (), Sampling(max_new_tokens=most), 0)
        vectors = None if request.prompt is None else prompts[request.prompt]
        return continuation(lm, request, vectors, writer, lm.kept_prefixes())

    alone = [tuple(generate(lm, [request], prompts, sampling)[0].ids) for request in REQUESTS]
    decoder, rows = Decoder(lm), [row(REQUESTS[0], 8), row(REQUESTS[1], 3), row(REQUESTS[2], 8), row(REQUESTS[1], 8)]
    with torch.no_grad():
        decoder.join(rows[:2])
        decoder.step()
        decoder.join(rows[2:])
        decoder.step()
        decoder.drop([rows[0]])
        while len(decoder):
            decoder.step()
    assert [tuple(one.writer.ids) for one in rows] == [alone[0][:2], alone[1][:3], alone[2], alone[1]]


def test_words_share_one_pass_of_the_encoder_and_what_they_begin_with() -> None:
    lm, seen = encoder_decoder("t5"), list[tuple[str, tuple[int, ...]]]()

    def note(name: str) -> Any:
        def hook(_: Any, __: Any, given: Any, ___: Any) -> None:
            ids = given.get("input_ids")
            seen.append((name, tuple((given["inputs_embeds"] if ids is None else ids).shape[:2])))

        return hook

    model = lm.model
    hooks = [
        part.register_forward_hook(note(name), with_kwargs=True)
        for name, part in (("encoder", model.get_encoder()), ("decoder", model.get_decoder()))
    ]
    try:
        lm.score([FIRST], soft_prompts())
    finally:
        for hook in hooks:
            hook.remove()
    # of (50, 1), (50, 51, 1), (52, 1) and (53,), the decoder reads two lines: 50 51, and 52
    assert seen == [("encoder", (1, 11)), ("decoder", (2, 3))]


def test_a_text_as_soft_prompt_is_that_text(kind: str) -> None:
    lm = encoder_decoder(kind)
    task = Task(lm, Template("{soft_prompt}{input}{target}"), Verbalizer.from_labels(["good", "bad"]), 7, lm.window)
    text = "the plot is thin"
    length = len(lm.tokenizer(text, add_special_tokens=False).input_ids)
    task = Task(lm, task.template, task.verbalizer, length, lm.window)
    vectors = initial_vectors(lm, length, init="text", seed=0, text=text)
    example = Example({"input": " and dull"}, None)
    soft = lm.score([task.label_request(example)], [vectors])
    hard = lm.score([task.without_soft_prompt(text).label_request(example, None)])
    torch.testing.assert_close(soft, hard, **TOLERANCE)


def test_training_changes_no_weight_and_goes_on_bit_for_bit(tmp_path: Path) -> None:
    lm, data, held_out = encoder_decoder("t5-1.1"), toy(15, 0), toy(10, 1)
    before = lm.weights_digest()

    def made(folder: Path) -> Training:
        settings = train_settings(steps=6, eval_every=3, checkpoint_every=1)
        return Training(toy_task(lm, data), data, held_out, settings, folder=folder, resume=True)

    whole = made(tmp_path / "whole")
    list(whole)
    for step in made(tmp_path / "parts"):
        if step.number == 4:
            break
    parts = made(tmp_path / "parts")
    assert parts.step == 4
    list(parts)
    assert torch.equal(parts.vectors, whole.vectors)
    assert not torch.equal(whole.vectors, made(tmp_path / "fresh").vectors)
    assert lm.weights_digest() == before


# --- tokens ----------------------------------------------------------------------------------------


def test_a_target_ends_so_that_each_label_can_win() -> None:
    lm = encoder_decoder("t5")
    labels = Verbalizer.from_labels(["great", "great film"])
    task = Task(lm, Template("{soft_prompt}{input}\nAnswer: {target}"), labels, 2, lm.window)
    expected = [tuple(lm.tokenizer(text_target=label).input_ids) for label in task.labels]
    assert task.words == tuple(expected)
    assert task.target_request(Example({"input": "a"}, "great")).words == (expected[0],)
    bias = {expected[0]: "great", expected[1]: "great film"}
    for likelier, label in bias.items():
        scores = torch.tensor([[0.0 if word == likelier else -1.0 for word in task.words]])
        assert task.labels[int(task.label_logprobs(scores).argmax())] == label
    assert not any(a != b and b[: len(a)] == a for a in task.words for b in task.words)


@pytest.mark.parametrize("kind", ["t5", "bart", "t5gemma"])
def test_input_and_target_are_what_the_tokenizer_makes_of_them(kind: str) -> None:
    lm = encoder_decoder(kind)
    task = Task(lm, Template("{input}{target}"), None, 0, lm.window)
    request = task.target_request(Example({"input": "a dull film"}, "very good"))
    assert list(request.ids) == lm.tokenizer("a dull film").input_ids
    labels = lm.tokenizer(text_target="very good").input_ids
    told = (*lm.decoder_start[1:], *request.words[0])
    assert told == tuple(labels if kind != "t5gemma" else [*labels[1:], 1])  # that tokenizer puts no end


def test_a_long_input_is_cut_before_its_end_and_takes_no_room_for_the_target() -> None:
    lm = encoder_decoder("t5")
    task = Task(lm, Template("{soft_prompt}{input}\nAnswer: {target}"), None, 4, 30)
    whole = task.open_request(Example({"input": "a film"}, None), 8)
    cut = task.open_request(Example({"input": "a film " * 20}, None), 28)
    assert cut.truncated
    assert len(cut.ids) - 1 + 4 == 30
    assert cut.ids[-4:] == whole.ids[-4:]
    assert cut.ids[-1] == 1
    with pytest.raises(TemplateError, match="target of at most 28 tokens, found 29; shorten it"):
        task.open_request(Example({"input": "a film"}, None), 29)


# --- what is refused ---------------------------------------------------------------------------------


def refused(kind: str, **options: Any) -> str:
    with pytest.raises(BaseModelError) as caught:
        FrozenLM(make_encoder_decoder(kind, **options), tokenizer_of("bart"), name="odd", dtype="fp32")
    return str(caught.value)


def test_a_model_that_scales_tokens_but_not_embeddings_is_refused() -> None:
    assert "other numbers from embedded and padded tokens than from the tokens alone" in refused("pegasus")


def test_a_decoder_without_a_first_token_is_refused() -> None:
    message = refused("bart", decoder_start_token_id=None, bos_token_id=None)
    assert "should say which token its decoder begins with" in message
    assert "set decoder_start_token_id" in message


def test_a_kv_prefix_is_refused_with_its_reason() -> None:
    data: Dataset = toy(12, 0)
    with pytest.raises(ConfigError, match=r"has none: it is an encoder-decoder \(t5\), whose encoder reads all"):
        Training(toy_task(encoder_decoder("t5"), data), data, None, train_settings(parametrisation="prefix"))


def test_a_harness_of_running_text_is_refused() -> None:
    lm_eval = pytest.importorskip("softprompt.evaluation.lm_eval")
    with pytest.raises(ConfigError, match="measure it with softprompt evaluate"):
        lm_eval.SoftPromptLM(encoder_decoder("t5"))
