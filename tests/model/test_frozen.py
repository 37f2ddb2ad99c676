"""The frozen model against transformers' own forward and generation, over a tiny model of every architecture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from softprompt.data.example import Example
from softprompt.errors import SoftPromptWarning
from softprompt.generation.decoder import generate
from softprompt.model import digest
from softprompt.model.frozen import FrozenLM
from softprompt.model.request import Request, Sampling
from softprompt.tasks.task import Task
from softprompt.text.template import Template
from softprompt.text.tokens import SOFT, frequent_tokens
from softprompt.text.verbalizer import Verbalizer
from softprompt.tuning.gradients import Gradients, Layout
from softprompt.tuning.objective import Objective
from softprompt.tuning.start import initial_vectors
from tests.conftest import ALL, SHARED, make_model, make_tokenizer, plain, plain_logprobs, plain_score, tiny
from tests.model.families import soft

TEXTS = ("a stirring film", "dull", "one of the best movies of the year , and a very funny one")
LABELS = Verbalizer({"good": ("very good", "great", "good"), "bad": ("very bad", "awful"), "so": ("very",)})
VOCABULARY = tuple((token,) for token in range(320))
LAYERS = ("sliding_attention", "full_attention")
TOLERANCE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
few = settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def task(lm: FrozenLM, template: str, length: int = 7, verbalizer: Verbalizer | None = LABELS) -> Task:
    return Task(lm, Template(template), verbalizer, length, 128)


def ids_of(lm: FrozenLM, text: str) -> tuple[int, ...]:
    return tuple(lm.tokenizer(text, add_special_tokens=False).input_ids)


# --- fact 1: a soft prompt initialised with a text is that text ----------------------------------------------


@pytest.mark.parametrize(
    "template", ["{soft_prompt}{input}\nAnswer: {target}", "Review :{soft_prompt} {input} ? {target}"]
)
def test_a_text_initialised_soft_prompt_gives_the_logits_of_the_text(kind: str, template: str) -> None:
    lm = tiny(kind)
    text = " the acting of this funny film is"
    length = len(ids_of(lm, text))
    vectors = initial_vectors(lm, length, init="text", seed=0, text=text)
    tuned = task(lm, template, length)
    hard = tuned.without_soft_prompt(text)
    for words in ("verbalizer", "vocabulary"):
        soft_requests = [tuned.label_request(Example({"input": text}, None)) for text in TEXTS]
        hard_requests = [hard.label_request(Example({"input": text}, None)) for text in TEXTS]
        if words == "vocabulary":  # every token as a word of its own: the log-probabilities of all logits
            soft_requests = [replace(r, words=VOCABULARY) for r in soft_requests]
            hard_requests = [replace(r, words=VOCABULARY) for r in hard_requests]
        expected = torch.stack(
            [torch.stack([plain_score(kind, r.ids, word) for word in r.words]) for r in hard_requests]
            if words == "verbalizer"
            else [plain_logprobs(kind, r.ids)[-1] for r in hard_requests]
        )
        torch.testing.assert_close(lm.score(soft_requests, [vectors]), expected, **TOLERANCE)
        torch.testing.assert_close(lm.score(hard_requests), expected, **TOLERANCE)


def test_the_words_of_these_tests_share_beginnings_and_have_several_tokens() -> None:
    bound = task(tiny("llama"), "{soft_prompt}{input} {target}")
    spelled = [word for words in bound.spellings for word in words]
    assert [len(word) for word in spelled] == [5, 3, 2, 4, 4, 3]
    assert spelled[0][:3] == spelled[3][:3] == spelled[5]
    assert bound.words == tuple(word + end for word in spelled for end in bound.ends)  # the sixth begins two others


def test_the_gain_of_the_first_layer_is_what_transformers_hidden_states_show(kind: str) -> None:
    lm, model = tiny(kind), plain(kind)
    states: list[torch.Tensor] = []
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 3)
    with (
        layers[0].register_forward_pre_hook(lambda layer, inputs: states.append(inputs[0])),
        layers[1].register_forward_pre_hook(lambda layer, inputs: states.append(inputs[0])),
    ):
        model(input_ids=torch.tensor([frequent_tokens(lm.tokenizer, len(lm.embedding), 0)[:100]]))
    before, after = (state[0, 1:].square().mean(dim=1).sqrt() for state in states)
    assert lm.first_layer_gain == pytest.approx(max(1.0, float((after / before).median())), rel=1e-4)


def test_a_gpu_computes_as_many_tokens_at_once_as_fit_its_share_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = FrozenLM(make_model("llama"), make_tokenizer(), name="on a GPU", dtype="fp32", device="cpu")
    assert lm.tokens_at_once == 2048
    # Numbers that go into and come out of a layer's matrix products, for each token: of attention 2 * 32 for queries
    # and output, 32 + 16 for keys and values, and 32 + 48 three times; two copies of 320 logits come on top.
    a_token = 4 * 3 * (2 * 64 + 2 * 48 + 3 * 80) + 4 * 2 * 320
    for tokens, expected in ((3000, 3000), (100, 2048), (50_000, 16_384)):
        lm = FrozenLM(make_model("llama"), make_tokenizer(), name="on a GPU", dtype="fp32", device="cpu")
        lm.device = torch.device("cuda")
        memory = SimpleNamespace(total_memory=10 * a_token * (tokens + 0.5))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, memory=memory: memory)
        assert lm.tokens_at_once == expected


# --- fact 2: the shared-prefix gradient is the concatenation gradient ----------------------------------------


def reference_gradient(
    kind: str, requests: Sequence[Request], gold: Sequence[int], vectors: torch.Tensor, owners: Sequence[int] | None
) -> tuple[float, torch.Tensor]:
    """Mean loss and gradient by transformers' forward and ``cross_entropy``, one example and one word at a time."""
    vectors = vectors.clone().requires_grad_()
    total = torch.zeros(())
    for request, label in zip(requests, gold, strict=True):
        if owners is None:
            word = request.words[label]
            logits = plain_logprobs(kind, (*request.ids, *word[:-1]), vectors)[-len(word) :]
            total = total + functional.cross_entropy(logits, torch.tensor(word), reduction="sum")
        else:
            scores = [plain_score(kind, request.ids, word, vectors) for word in request.words]
            labels = [
                torch.stack([s for s, owner in zip(scores, owners, strict=True) if owner == k]).logsumexp(0)
                for k in sorted(set(owners))
            ]
            total = total + functional.cross_entropy(torch.stack(labels)[None], torch.tensor([label]))
    count = len(requests) if owners is not None else sum(len(r.words[0]) for r in requests)
    (gradient,) = torch.autograd.grad(total / count, vectors)
    return float(total.detach()) / count, gradient


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("loss", ["lm", "labels"])
@pytest.mark.parametrize(
    ("template", "length"),
    [
        ("{soft_prompt}{input}\nAnswer: {target}", 7),
        ("Review :{soft_prompt} is it good ? {input}\nAnswer: {target}", 1),
        ("{input}{soft_prompt}\nAnswer: {target}", 3),  # nothing is shared: the concatenation path serves it
    ],
)
def test_every_path_gives_the_gradient_of_one_example_at_a_time(
    kind: str, loss: str, template: str, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, vectors = tiny(kind), soft(length)
    bound = task(lm, template, length)
    targets = ("good", "bad", "so")
    examples = [Example({"input": text}, target) for text, target in zip(TEXTS, targets, strict=True)]
    if loss == "lm":
        requests, gold, owners = [bound.target_request(e) for e in examples], [0, 0, 0], None
    else:
        requests, gold = [bound.label_request(e) for e in examples], [0, 1, 2]
        owners = bound.label_of_word
    expected, gradient = reference_gradient(kind, requests, gold, vectors, owners)

    def check(max_tokens: int, layout: Layout | None = None) -> None:
        leaf = vectors.clone().requires_grad_()
        found, _ = Gradients(lm, layout=layout, max_tokens=max_tokens).backward(Objective(owners), requests, gold, leaf)
        assert found == pytest.approx(expected, rel=1e-5)
        assert leaf.grad is not None
        assert relative(leaf.grad, gradient) < 1e-5

    assert lm.shares_prefix == (kind in SHARED)
    for max_tokens in (1, 40, 4096):  # every row alone, some together, all together
        check(max_tokens)
    if all(request.shares_prefix for request in requests) and lm.shares_prefix:
        check(4096, "two stages")
        check(4096, "stream")
    monkeypatch.setattr(lm, "shares_prefix", False)
    for max_tokens in (1, 4096):
        check(max_tokens)


@pytest.mark.parametrize("kind", SHARED)
def test_scores_of_the_shared_prefix_are_those_of_whole_sequences(kind: str) -> None:
    lm, vectors = tiny(kind), soft(5)
    bound = task(lm, "Review :{soft_prompt} is it ? {input} {target}", 5)
    requests = [bound.label_request(Example({"input": text}, None)) for text in TEXTS]
    torch.testing.assert_close(
        lm.score(requests, [vectors]), lm.score_concatenated(requests, [vectors]).detach(), **TOLERANCE
    )


def test_whole_sequences_run_the_head_only_where_they_are_read(kind: str) -> None:
    lm, ran = tiny(kind), list[tuple[int, ...]]()
    requests = [Request((SOFT, 60, 61), 1, ((70, 71, 72), (70, 80)), 0), Request((SOFT, 60), 1, ((70,),), 0)]
    head = lm.model.get_output_embeddings()
    with head.register_forward_hook(lambda head, inputs, logits: ran.append(tuple(logits.shape))):
        lm.score_concatenated(requests, [soft(7)])
    assert ran == [(3, 11 - 7, 320)]  # read are places 8 to 10, 8 to 9, and 7


def test_peft_gives_the_same_loss_and_gradient() -> None:
    from peft import PromptTuningConfig, get_peft_model

    lm, vectors = tiny("llama"), soft(6)
    bound = task(lm, "{soft_prompt}{input}\nAnswer: {target}", 6, None)
    requests = [
        bound.target_request(Example({"input": text}, target)) for text, target in zip(TEXTS, TEXTS, strict=True)
    ]
    model: Any = get_peft_model(make_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6))
    weight = model.prompt_encoder.default.embedding.weight
    with torch.no_grad():
        weight.copy_(vectors)
    rows = [([t for t in r.ids if t != SOFT], r.words[0]) for r in requests]
    width = max(len(before) + len(target) for before, target in rows)
    pads = [width - len(before) - len(target) for before, target in rows]
    ids = torch.tensor([[*b, *t, *[0] * pad] for (b, t), pad in zip(rows, pads, strict=True)])
    mask = torch.tensor([[1] * (width - pad) + [0] * pad for pad in pads])
    labels = torch.tensor([[*[-100] * len(b), *t, *[-100] * p] for (b, t), p in zip(rows, pads, strict=True)])
    theirs = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    theirs.backward()

    leaf = vectors.clone().requires_grad_()
    ours, _ = Gradients(lm).backward(Objective(), requests, [0, 0, 0], leaf)
    assert leaf.grad is not None
    assert ours == pytest.approx(float(theirs.detach()), rel=1e-5)
    assert relative(leaf.grad, weight.grad) < 1e-5


def test_the_number_of_computed_tokens_counts_the_prefix_once(llama: FrozenLM) -> None:
    request = Request((3, SOFT, 4, 60, 61), 3, ((70, 71, 72), (70, 80)), 0)  # 2 + P shared, 2 own, the trie's 70 and 71
    _, tokens = Gradients(llama).backward(Objective((0, 1)), [request] * 3, [0, 1, 0], soft(7).requires_grad_())
    assert tokens == 2 + 7 + 3 * (2 + 2)


def test_bf16_is_close_to_fp32() -> None:
    lm = FrozenLM(make_model("llama"), make_tokenizer(), name="bf16", dtype="bf16", device="cpu")
    vectors = soft(7)
    gradients = []
    for model in (lm, tiny("llama")):
        bound = task(model, "{soft_prompt}{input}\nAnswer: {target}")
        requests = [bound.label_request(Example({"input": text}, None)) for text in TEXTS]
        leaf = vectors.clone().requires_grad_()
        Gradients(model).backward(Objective(bound.label_of_word), requests, [0, 1, 2], leaf)
        assert leaf.grad is not None
        assert leaf.grad.dtype == torch.float32
        gradients.append(leaf.grad)
    assert relative(*gradients) < 0.1  # bf16 keeps 8 bits, some 0.4 % an operation
    assert lm.score(requests, [vectors]).dtype == torch.float32


def test_rotary_frequencies_stay_exact_in_bf16() -> None:
    lm = FrozenLM(make_model("llama"), make_tokenizer(), name="bf16", dtype="bf16", device="cpu")
    assert {p.dtype for p in lm.model.parameters()} == {torch.bfloat16}
    buffers = dict(make_model("llama").named_buffers())
    assert buffers
    for name, buffer in lm.model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"final_logit_softcapping": 0.5},
        {"rope_parameters": {kind: {"rope_type": "dynamic", "factor": 2.0} for kind in LAYERS}},
    ],
)
def test_a_model_that_scales_its_embedding_or_differs_otherwise(setting: dict[str, Any]) -> None:
    """Gemma feeds its embedding scaled."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    sizes: dict[str, Any] = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    config = Gemma3TextConfig(**sizes, **heads, layer_types=list(LAYERS), **setting)
    torch.manual_seed(7)
    gemma: Any = Gemma3ForCausalLM
    model = gemma(config).eval().requires_grad_(False)
    ids, word = (3, 4, 5, 60, 61), (70, 71)
    logprobs = model(input_ids=torch.tensor([[*ids, 70]])).logits[0].log_softmax(dim=-1)
    expected = float(logprobs[4, 70] + logprobs[5, 71])
    lm = FrozenLM(model, make_tokenizer(), name="gemma", dtype="fp32", device="cpu")
    assert lm.shares_prefix
    assert float(lm.score([Request(ids, 3, (word,))])) == pytest.approx(expected, rel=1e-5)
    as_soft = Request((SOFT, 60, 61), 1, (word,), 0)
    assert float(lm.score([as_soft], [lm.embedding[[3, 4, 5]]])) == pytest.approx(expected, rel=1e-5)


# --- fact 3: the base model is frozen ------------------------------------------------------------------------


def test_no_weight_requires_a_gradient_and_none_changes(lm: FrozenLM) -> None:
    before = lm.weights_digest()
    assert not any(p.requires_grad for p in lm.model.parameters())
    assert not lm.model.training
    leaf = soft(3).requires_grad_()
    Gradients(lm).backward(Objective(), [Request((SOFT, 60, 61), 1, ((70, 71),), 0)], [0], leaf)
    generate(lm, [Request((SOFT, 60, 61), 1, (), 0)], [leaf.detach()], Sampling(max_new_tokens=3))
    assert lm.weights_digest() == before


def splitmix64(word: int) -> int:
    """Steele, Lea and Flood 2014, figure 17, with numbers of any size."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        word = (word ^ (word >> shift)) * factor % 2**64
    return word ^ (word >> 31)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 64, 1003])
def test_the_hash_on_a_device_is_a_sum_of_splitmix64(
    size: int, llama: FrozenLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digest, "HASHED_AT_ONCE", 256)
    content = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
    padded = bytes(content.tolist()) + bytes(-size % 8)
    words = [int.from_bytes(padded[i : i + 8], "little") for i in range(0, len(padded), 8)]
    expected = sum(splitmix64((word + (i + 1) * 0x9E3779B97F4A7C15) % 2**64) for i, word in enumerate(words)) % 2**64
    assert digest.device_hash(content) == expected
    shifted = torch.cat([torch.zeros(3, dtype=torch.uint8), content])[3:]  # where no word of 8 bytes may begin
    assert digest.device_hash(shifted) == expected


def test_the_hash_on_a_device_notices_bits_signs_and_swaps() -> None:
    """Two flipped signs at once, which a sum of multiples would not notice, too."""
    weights = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    seen = {digest.device_hash(weights.view(torch.uint8))}
    changed = []
    for bit in range(0, 32_000, 797):
        words = weights.clone().view(torch.uint8)
        words[bit // 8] ^= 1 << bit % 8
        changed.append(words)
    for i, j in ((0, 2), (5, 998)):
        swapped, signs, odd = weights.clone(), weights.clone(), weights.clone()
        swapped[[i, j]] = weights[[j, i]]
        signs[[i, j]] = -weights[[i, j]]
        odd[[2 * (i // 2) + 1, 2 * (j // 2) + 1]] *= -1  # the highest bits of two words
        changed += [each.view(torch.uint8) for each in (swapped, signs, odd)]
    for each in changed:
        seen.add(digest.device_hash(each))
    assert len(seen) == 1 + len(changed)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_weights_digest_notices_one_flipped_bit_anywhere(kind: str, dtype: str) -> None:
    lm = FrozenLM(make_model(kind), make_tokenizer(), name=kind, dtype=dtype, device="cpu")
    before = lm.weights_digest()
    tensors = [*lm.model.parameters(), *lm.model.buffers()]
    for place, tensor in enumerate(tensors):
        flat = tensor.data.view(-1).view(torch.uint8)
        byte = (place * 7919) % flat.numel()
        flat[byte] ^= 1 << (place % 8)
        assert lm.weights_digest() != before
        flat[byte] ^= 1 << (place % 8)
    assert lm.weights_digest() == before


# --- fact 5: a mixed batch is one request at a time ----------------------------------------------------------


def mixed(lm: FrozenLM) -> tuple[list[Request], list[torch.Tensor]]:
    """Requests of five soft prompts, most with templates and labels of their own, and of the bare base model."""
    prompts = [soft(length, seed=length) for length in (1, 4, 9, 20, 2)]
    tasks = [
        task(lm, "{soft_prompt}{input}\nAnswer: {target}", 1),
        task(lm, "Review :{soft_prompt} {input} {target}", 4, Verbalizer.from_labels(["yes", "no"])),
        task(lm, "{input}{soft_prompt} {target}", 9, Verbalizer.from_labels(["one", "two", "very bad", "very"])),
        task(lm, "{soft_prompt} the best ? {input} {target}", 20, Verbalizer.from_labels(["a", "b", "c"])),
        task(lm, "{soft_prompt}{input}\nAnswer: {target}", 2),  # the first one's template
        task(lm, "{input} Answer: {target}", 0),
        task(lm, "the plot : {input} {target}", 0, Verbalizer.from_labels(["good", "bad"])),
    ]
    examples = [Example({"input": text}, None) for text in TEXTS]
    requests = [
        bound.label_request(example, prompt=number if number < 5 else None)
        for number, bound in enumerate(tasks)
        for example in examples[: 3 if number % 2 else 2]
    ]
    return requests, prompts


@pytest.mark.parametrize("kind", ALL)
@few
@given(data=st.data())
def test_a_mixed_batch_scores_like_one_request_at_a_time(kind: str, data: st.DataObject) -> None:
    lm = tiny(kind)
    requests, prompts = mixed(lm)
    order = data.draw(st.permutations(range(len(requests))))
    max_tokens = data.draw(st.sampled_from([1, 100, 10_000]))
    together = lm.score([requests[i] for i in order], prompts, max_tokens=max_tokens)
    most = max(len(request.words) for request in requests)
    assert together.shape == (len(requests), most)
    for row, i in zip(together, order, strict=True):
        request = requests[i]
        vectors = None if request.prompt is None else prompts[request.prompt]
        expected = torch.stack([plain_score(kind, request.ids, word, vectors) for word in request.words])
        torch.testing.assert_close(row[: len(request.words)], expected, **TOLERANCE)
        assert row[len(request.words) :].tolist() == [-math.inf] * (most - len(request.words))


def own_generation(
    kind: str, request: Request, prompts: Sequence[torch.Tensor], tokens: int, end: int = 1
) -> list[int]:
    """Greedy continuation by transformers' ``generate``, without the end token."""
    model = plain(kind)
    lookup = model.get_input_embeddings()
    pieces = [prompts[request.prompt or 0] if token == SOFT else lookup(torch.tensor([token])) for token in request.ids]
    embedded = torch.cat(pieces)[None]
    mask = torch.ones(embedded.shape[:2], dtype=torch.long)
    found = model.generate(
        inputs_embeds=embedded,
        attention_mask=mask,
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=end,
    )
    return [token for token in found[0].tolist() if token != end]


@pytest.mark.parametrize("kind", ALL)
def test_words_that_greedy_decoding_writes_are_told_from_others(kind: str) -> None:
    lm = tiny(kind)
    requests, prompts = mixed(lm)
    asked = []
    for number, request in enumerate(requests):
        written = own_generation(kind, request, prompts, 3) if request.prompt is not None else []
        words = [tuple(written[:1]), tuple(written), (*written[:2], 70), (71, *written[1:]), (70,)]
        chosen = tuple(word for word in words[: 5 - number % 2] if word) or ((70,),)
        asked.append(replace(request, words=chosen))
    scores, greedy = lm.score_and_compare(asked, prompts)
    assert torch.equal(scores, lm.score(asked, prompts))
    assert greedy.shape == scores.shape
    hits = 0
    for row, request in zip(greedy.tolist(), asked, strict=True):
        vectors = None if request.prompt is None else prompts[request.prompt]
        for said, word in zip(row, request.words, strict=False):
            logprobs = plain_logprobs(kind, (*request.ids, *word[:-1]), vectors)[-len(word) :]
            assert said == (logprobs.argmax(dim=-1).tolist() == list(word))
            hits += said
        assert not any(row[len(request.words) :])
    assert hits > len(requests)


def test_no_requests_give_no_results(llama: FrozenLM) -> None:
    assert llama.score([]).shape == (0, 0)
    assert generate(llama, []) == []


def test_an_empty_template_prefix_works(kind: str) -> None:
    """A template that starts with the input shares nothing; scores and text are the base model's own."""
    lm = tiny(kind)
    request = Request((60, 61, 62), 0, ((70, 71),))
    expected = plain_score(kind, request.ids, (70, 71))
    torch.testing.assert_close(lm.score([request])[0, 0], expected, **TOLERANCE)
    assert list(generate(lm, [request], (), Sampling(max_new_tokens=4))[0].ids) == own_generation(kind, request, (), 4)


def test_a_prefix_knows_its_size(llama: FrozenLM) -> None:
    prefix = llama.prefix_kv((3, SOFT, 4), soft(5))
    assert prefix.lengths == (7,)
    assert prefix.width == 7
    assert [tuple(tensor.shape) for tensor in prefix.tensors] == [(1, 2, 7, 8)] * 6  # keys and values of 3 layers
    assert prefix.nbytes == 2 * 3 * 2 * 7 * 8 * 4


def test_a_model_may_be_frozen_twice() -> None:
    model, request = make_model("llama"), Request((SOFT, 60, 61), 1, ((70, 71),), 0)
    first = FrozenLM(model, make_tokenizer(), name="first", dtype="fp32", device="cpu").score([request], [soft(3)])
    again = FrozenLM(model, make_tokenizer(), name="again", dtype="fp32", device="cpu").score([request], [soft(3)])
    assert torch.equal(first, again)
    assert float(first) == pytest.approx(float(plain_score("llama", request.ids, (70, 71), soft(3))), rel=1e-4)


def test_what_a_frozen_model_says_of_itself(llama: FrozenLM) -> None:
    table = make_model("llama").get_input_embeddings().weight.detach()
    assert llama.hidden_size == 32
    assert llama.window == 128
    assert torch.equal(llama.embedding, table)
    assert llama.embedding_rms == pytest.approx(float((table**2).mean() ** 0.5), rel=1e-6)
    assert llama.num_parameters == sum(p.numel() for p in make_model("llama").parameters())


def gradient_of(lm: FrozenLM) -> torch.Tensor:
    bound = task(lm, "{soft_prompt}{input}\nAnswer: {target}")
    requests = [bound.label_request(Example({"input": text}, None)) for text in TEXTS]
    leaf = soft(7).requires_grad_()
    Gradients(lm, max_tokens=60).backward(Objective(bound.label_of_word), requests, [0, 1, 2], leaf)
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.slow
def test_a_compiled_step_has_the_gradient_of_an_eager_one() -> None:
    """Takes a C++ compiler and about a minute."""
    lm = FrozenLM(make_model("llama"), make_tokenizer(), name="compiled", dtype="fp32", device="cpu")
    eager, before = gradient_of(lm), lm.score([Request((3, 60), 1, VOCABULARY)])
    lm.layers.set(compiled=True)
    assert relative(gradient_of(lm), eager) < 1e-5
    torch.testing.assert_close(lm.score([Request((3, 60), 1, VOCABULARY)]), before, rtol=0, atol=0)
    lm.layers.set(compiled=False)
    assert torch.equal(gradient_of(lm), eager)


def test_where_the_compiler_does_not_work_layers_go_on_as_they_are(broken_compiler: list[str]) -> None:
    lm = FrozenLM(make_model("llama"), make_tokenizer(), name="uncompiled", dtype="fp32", device="cpu")
    eager = gradient_of(lm)
    lm.layers.set(compiled=True)
    assert lm.layers.compiled
    with pytest.warns(SoftPromptWarning, match=r"x.cpp:1: fatal error: Python.h: no file\)") as told:
        found = gradient_of(lm)  # its rows were laid out for compiled layers
    torch.testing.assert_close(found, eager, rtol=1e-5, atol=1e-6)
    assert len(told) == 1
    assert broken_compiler
    assert not lm.layers.compiled
    lm.layers.set(compiled=False)
    assert torch.equal(gradient_of(lm), eager)
