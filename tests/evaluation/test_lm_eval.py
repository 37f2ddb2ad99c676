"""lm-evaluation-harness over a frozen base model: its own class ``hf`` and transformers alone are the oracles.

Skipped where the harness is not installed: ``pip install -e ".[eval]"``, then run this file.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from softprompt.data.example import Dataset, Example
from softprompt.errors import BaseModelError, ConfigError, DataError, TemplateError
from softprompt.evaluation.evaluate import evaluate
from softprompt.model.frozen import FrozenLM
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.tasks.task import Task
from tests.conftest import SENTENCES, make_model, make_tokenizer, plain, plain_logprobs, plain_score, tiny

pytest.importorskip("lm_eval")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from softprompt.evaluation.lm_eval import SoftPromptLM, task_of_rows

KINDS = ("llama", "gpt2", "stablelm")
"""Two of the shared-prefix path, one of the concatenation path."""
SOFT = -1


def made(
    lm: FrozenLM, *, tokens: int = 5, template: str = "{soft_prompt}Text: {input}\nLabel: {target}", **more: Any
) -> SoftPrompt:
    draw = torch.Generator().manual_seed(3)
    return SoftPrompt(
        vectors=0.15 * torch.randn(tokens, lm.hidden_size, generator=draw),
        name="made",
        base=lm.name,
        base_fingerprint=lm.fingerprint,
        tokenizer_fingerprint=lm.tokenizer_fingerprint,
        template=template,
        **more,
    )


def with_bos() -> tuple[Any, FrozenLM]:
    """A tokenizer that puts a beginning-of-sequence token first, and the tiny Llama with it."""
    tokenizer = make_tokenizer()
    tokenizer.bos_token = "<pad>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 0)])
    return tokenizer, FrozenLM(make_model("llama"), tokenizer, name="tiny-bos", dtype="fp32", device="cpu")


def asked(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


def theirs(kind: str, tokenizer: Any = None) -> Any:
    return HFLM(pretrained=plain(kind), tokenizer=tokenizer or make_tokenizer(), batch_size=3)


def assert_same(found: Sequence[tuple[float, bool]], wanted: Sequence[tuple[float, bool]]) -> None:
    for (logprob, greedy), (other, other_greedy) in zip(found, wanted, strict=True):
        assert logprob == pytest.approx(other, rel=1e-5, abs=1e-5)
        assert greedy == other_greedy


LONG = " ".join(SENTENCES * 4)
PAIRS = [
    ("a dull , badly", " written mess"),
    ("a dull , badly ", "written mess"),  # the blank goes over to the continuation
    ("a dull , badly", " good"),
    ("", "one of the best"),
    ("the plot", " is thin and the acting is worse"),
    (LONG, " great"),  # longer than the window of 128
    (LONG + "x", " one of the best movies of the year"),
]


# --- without a soft prompt: what the harness's own class gives ------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_log_likelihoods_are_those_of_the_harness_itself(kind: str) -> None:
    found = SoftPromptLM(tiny(kind)).loglikelihood(asked("loglikelihood", *PAIRS), disable_tqdm=True)
    assert_same(found, theirs(kind).loglikelihood(asked("loglikelihood", *PAIRS), disable_tqdm=True))


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_of_the_vocabulary_is_greedy_or_not_as_there(kind: str) -> None:
    tokenizer = make_tokenizer()
    texts = [tokenizer.decode([token]) for token in range(2, 320)]
    single = [text for text in texts if len(tokenizer(f"bad{text}").input_ids) == 1 + len(tokenizer("bad").input_ids)]
    pairs = [("bad", text) for text in single] + [("the plot is bad", text) for text in single]
    found = SoftPromptLM(tiny(kind)).loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True)
    wanted = theirs(kind).loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True)
    assert_same(found, wanted)
    best = max(range(len(single)), key=lambda i: found[i][0])
    assert [i for i in range(len(single)) if found[i][1]] in ([best], [])


@pytest.mark.parametrize("kind", KINDS)
def test_what_greedy_decoding_writes_is_greedy_and_nothing_else_is(kind: str) -> None:
    lm, tokenizer = tiny(kind), make_tokenizer()
    soft = made(lm)
    contexts = sorted({sentence[:end].rstrip() for sentence in SENTENCES for end in range(3, 30, 3)})
    pairs, wanted = [], []
    for context in contexts:
        ids = tokenizer(context).input_ids
        order = plain_logprobs(kind, [SOFT, *ids], soft.vectors)[-1].argsort(descending=True)[:20].tolist()
        for rank, token in enumerate(order):
            text = str(tokenizer.decode([token]))
            if tokenizer(context + text).input_ids == [*ids, token]:  # not half a character
                pairs.append((context, text))
                wanted.append(rank == 0)
    found = SoftPromptLM(lm, soft).loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True)
    assert [greedy for _, greedy in found] == wanted
    assert 3 <= sum(wanted) < len(wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_rolling_log_likelihoods_are_those_of_the_harness_itself(kind: str) -> None:
    texts = [(text,) for text in (*SENTENCES, LONG, "a")]
    found = SoftPromptLM(tiny(kind)).loglikelihood_rolling(asked("loglikelihood_rolling", *texts), disable_tqdm=True)
    wanted = theirs(kind).loglikelihood_rolling(asked("loglikelihood_rolling", *texts), disable_tqdm=True)
    assert found == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_texts_are_those_of_the_harness_itself(kind: str) -> None:
    wishes: list[dict[str, Any]] = [
        {"until": ["e", "\n"], "max_gen_toks": 12},
        {"until": ["zzz"], "max_gen_toks": 20, "do_sample": False, "temperature": 0.0},
        {"until": [], "max_new_tokens": 5, "num_beams": 1, "top_k": 7, "do_sample": False},
    ]
    requests = [(context, wish) for wish in wishes for context in (*SENTENCES, LONG)]
    found = SoftPromptLM(tiny(kind)).generate_until(asked("generate_until", *requests), disable_tqdm=True)
    assert found == theirs(kind).generate_until(asked("generate_until", *requests), disable_tqdm=True)
    assert any(found)


def test_a_beginning_of_sequence_token_stands_where_the_harness_puts_it() -> None:
    tokenizer, lm = with_bos()
    own = HFLM(pretrained=plain("llama"), tokenizer=tokenizer, batch_size=3)
    pairs = [*PAIRS, ("<pad>a dull", " mess")]  # a text that has the token gets no second one
    found = SoftPromptLM(lm).loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True)
    assert_same(found, own.loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True))
    texts = asked("loglikelihood_rolling", *((text,) for text in (*SENTENCES, LONG)))
    found_texts = SoftPromptLM(lm).loglikelihood_rolling(texts, disable_tqdm=True)
    assert found_texts == pytest.approx(own.loglikelihood_rolling(texts, disable_tqdm=True), rel=1e-5)


# --- with a soft prompt: transformers alone over the concatenated embeddings ----------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_soft_prompt_stands_at_the_very_start(kind: str) -> None:
    lm, tokenizer = tiny(kind), make_tokenizer()
    soft = made(lm)
    found = SoftPromptLM(lm, soft).loglikelihood(asked("loglikelihood", *PAIRS), disable_tqdm=True)
    for (context, continuation), (logprob, _) in zip(PAIRS, found, strict=True):
        whole = tokenizer(context + continuation).input_ids
        before = tokenizer(context.rstrip(" ")).input_ids if context else []
        word = whole[len(before) :]
        before = before or [tokenizer.eos_token_id]
        room = 128 - 5 + 1 - len(word)  # the last token is only predicted
        wanted = float(plain_score(kind, [SOFT, *before[-room:]], word, soft.vectors))
        assert logprob == pytest.approx(wanted, rel=1e-5, abs=1e-5)


def test_the_soft_prompt_stands_behind_the_beginning_of_sequence_token() -> None:
    _, lm = with_bos()
    soft = made(lm)
    pairs = [("a dull , badly", " written mess"), ("", "one of"), (LONG, " great")]
    found = SoftPromptLM(lm, soft).loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True)
    plainly = make_tokenizer()
    for (context, continuation), (logprob, _) in zip(pairs, found, strict=True):
        before = plainly(context).input_ids
        word = plainly(context + continuation).input_ids[len(before) :]
        room = 128 - 6 + 1 - len(word)  # the token before the soft prompt stays
        wanted = float(plain_score("llama", [0, SOFT, *before[-room:]], word, soft.vectors))
        assert logprob == pytest.approx(wanted, rel=1e-5, abs=1e-5)


def test_every_window_of_a_long_text_has_the_soft_prompt() -> None:
    lm, tokenizer = tiny("llama"), make_tokenizer()
    soft = made(lm, tokens=28)  # leaves windows of 100 tokens
    (found,) = SoftPromptLM(lm, soft).loglikelihood_rolling(asked("loglikelihood_rolling", (LONG,)), disable_tqdm=True)
    ids = tokenizer(LONG).input_ids
    assert len(ids) > 300
    total = plain_score("llama", [SOFT, tokenizer.eos_token_id], ids[:100], soft.vectors)
    for start in range(100, len(ids), 100):
        end = min(start + 100, len(ids))
        before = ids[end - 101 : start]
        total = total + plain_score("llama", [SOFT, *before], ids[start:end], soft.vectors)
    assert found == pytest.approx(float(total), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_texts_with_a_soft_prompt_are_those_of_transformers(kind: str) -> None:
    lm, tokenizer = tiny(kind), make_tokenizer()
    soft, model = made(lm), plain(kind)
    found = SoftPromptLM(lm, soft).generate_until(
        asked("generate_until", *((text, {"max_gen_toks": 10}) for text in SENTENCES)), disable_tqdm=True
    )
    for text, answer in zip(SENTENCES, found, strict=True):
        embedded = model.get_input_embeddings()(torch.tensor(tokenizer(text).input_ids))
        written = model.generate(
            inputs_embeds=torch.cat([soft.vectors, embedded])[None], max_new_tokens=10, do_sample=False, pad_token_id=0
        )
        assert answer == tokenizer.decode(written[0], skip_special_tokens=True)


def test_a_kv_prefix_gives_what_its_soft_prompt_gives() -> None:
    lm = tiny("llama")
    soft = made(lm)
    kv = replace(soft, vectors=lm.trained.numbers([SOFT], soft.vectors), parametrisation="prefix")
    pairs = [pair for pair in PAIRS if pair[0]]
    found = SoftPromptLM(lm, kv).loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True)
    assert_same(found, SoftPromptLM(lm, soft).loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True))


def test_leaving_the_soft_prompt_out_gives_the_base_model() -> None:
    lm = tiny("llama")
    found = SoftPromptLM(lm, made(lm), base_only=True).loglikelihood(asked("loglikelihood", *PAIRS), disable_tqdm=True)
    assert_same(found, SoftPromptLM(lm).loglikelihood(asked("loglikelihood", *PAIRS), disable_tqdm=True))


# --- the template ---------------------------------------------------------------------------------


def test_the_template_stands_around_a_context_and_a_long_one_is_cut_from_the_left() -> None:
    lm, tokenizer = tiny("llama"), make_tokenizer()
    soft = made(lm)
    pairs = [("a dull mess", " good"), (LONG, " good")]
    found = SoftPromptLM(lm, soft, use_template=True).loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True)
    head, tail, word = (tokenizer(text).input_ids for text in ("Text:", "\nLabel:", " good"))
    for (context, _), (logprob, _) in zip(pairs, found, strict=True):
        room = 128 - 5 - len(head) - len(tail) - len(word)
        before = [SOFT, *head, *tokenizer(" " + context).input_ids[-room:], *tail]
        assert logprob == pytest.approx(float(plain_score("llama", before, word, soft.vectors)), rel=1e-5)


def test_a_template_with_several_fields_wants_them_by_name() -> None:
    lm, tokenizer = tiny("llama"), make_tokenizer()
    soft = made(lm, template="{soft_prompt}{question} {passage}\n{target}")
    model = SoftPromptLM(lm, soft, use_template=True)
    context = json.dumps({"passage": "the plot", "question": "good film"})
    ((found, _),) = model.loglikelihood(asked("loglikelihood", (context, "bad")), disable_tqdm=True)
    before = [t for text in ("good film", " the plot", "\n") for t in tokenizer(text).input_ids]
    wanted = plain_score("llama", [SOFT, *before], tokenizer("bad").input_ids, soft.vectors)
    assert found == pytest.approx(float(wanted), rel=1e-5)
    with pytest.raises(ConfigError, match=r"2 places for input"):
        model.loglikelihood(asked("loglikelihood", ("the plot", "bad")), disable_tqdm=True)


def rows(labels: Sequence[str], count: int, fields: Sequence[str] = ("input",)) -> Dataset:
    draw = random.Random(5)
    words = " ".join(SENTENCES).split()
    return Dataset(
        tuple(
            Example(
                {field: " ".join(draw.choices(words, k=draw.randint(1, 60))) for field in fields}, draw.choice(labels)
            )
            for _ in range(count)
        ),
        "rows.jsonl",
        "made",
    )


@pytest.mark.parametrize(
    ("verbalizer", "template", "fields"),
    [
        ({"bad": ("bad",), "good": ("good",)}, "{soft_prompt}Text: {input}\nLabel: {target}", ("input",)),
        ({"0": ("bad", "awful"), "1": ("good", "great")}, "Text: {input}\n{soft_prompt}Label: {target}", ("input",)),
        ({"1": ("1",), "10": ("10",), "2": ("2",)}, "{soft_prompt}{a}\n{b} => {target}", ("a", "b")),
    ],
)
@pytest.mark.parametrize("base_only", [False, True])
def test_the_harness_counts_the_same_answers_right(
    verbalizer: dict[str, tuple[str, ...]], template: str, fields: Sequence[str], base_only: bool
) -> None:
    lm = tiny("llama")
    soft = made(lm, template=template, verbalizer=verbalizer, word_end=True)
    data = rows(list(verbalizer), 40, fields)
    task = Task.of(lm, soft)
    ours = evaluate(
        task.without_soft_prompt() if base_only else task,
        None if base_only else soft.vectors,
        data,
        metrics=["accuracy"],
    ).headline
    found = lm_eval.simple_evaluate(
        SoftPromptLM(lm, soft, use_template=True, base_only=base_only),
        tasks=[task_of_rows(soft, data, "mine")],
        task_manager=TaskManager(include_defaults=False),
    )
    measured = found["results"]["mine"]
    assert measured["acc,none"] == pytest.approx(ours.value, abs=1e-9)
    assert 0 < ours.value < 1
    assert measured["acc_stderr,none"] == pytest.approx(ours.stderr, rel=0.03)  # n - 1 there, n here
    assert found["n-samples"]["mine"]["effective"] == 40


# --- tasks in files -------------------------------------------------------------------------------

TASK = """\
task: films
dataset_path: json
dataset_kwargs:
  data_files: {{test: {rows}}}
  cache_dir: {cache}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}\\nIt is"
doc_to_choice: [bad, good]
doc_to_target: gold
fewshot_split: test
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def write_task(folder: Path) -> Path:
    lines = [json.dumps({"text": text, "gold": number % 2}) for number, text in enumerate(SENTENCES * 3)]
    (folder / "films.jsonl").write_text("\n".join(lines), encoding="utf-8")
    text = TASK.format(rows=folder / "films.jsonl", cache=folder / "cache")
    (folder / "films.yaml").write_text(text, encoding="utf-8")
    return folder / "films.yaml"


def test_a_task_gives_the_same_results_in_both_classes(tmp_path: Path) -> None:
    manager = TaskManager(include_path=str(write_task(tmp_path).parent), include_defaults=False)
    results = [
        lm_eval.simple_evaluate(model, tasks=["films"], num_fewshot=2, task_manager=manager)
        for model in (SoftPromptLM(tiny("llama")), theirs("llama"))
    ]
    ours, others = (found["results"]["films"] for found in results)
    assert ours == others
    for one, other in zip(*(found["samples"]["films"] for found in results), strict=True):
        assert [float(a[0]) for a in one["filtered_resps"]] == pytest.approx(
            [float(a[0]) for a in other["filtered_resps"]], rel=1e-5
        )
    assert results[0]["config"]["soft_prompt"] is None


# --- mistakes -------------------------------------------------------------------------------------


def test_a_soft_prompt_of_another_base_model_is_refused() -> None:
    with pytest.raises(BaseModelError):
        SoftPromptLM(tiny("gpt2"), made(tiny("llama")))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_gen_toks": 200}, "smaller max_gen_toks"),
        ({}, "smaller max_gen_toks"),  # 256 by default
        ({"max_gen_toks": 3, "repetition_penalty": 1.3}, "repetition_penalty=1.3"),
        ({"max_gen_toks": 3, "do_sample": True, "temperature": 0.7, "top_k": 5}, "top_k=5"),
        ({"max_gen_toks": 3, "do_sample": True}, "without a temperature"),
    ],
)
def test_what_would_change_the_text_silently_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SoftPromptLM(tiny("llama")).generate_until(asked("generate_until", ("a", settings)), disable_tqdm=True)


def test_drawn_texts_differ_between_repeats_and_not_between_runs() -> None:
    wish = {"max_gen_toks": 8, "do_sample": True, "temperature": 1.5, "top_p": 0.9}
    requests = asked("generate_until", *(("a dull", wish),) * 6)
    found = [SoftPromptLM(tiny("llama")).generate_until(requests, disable_tqdm=True) for _ in range(2)]
    assert found[0] == found[1]
    assert len(set(found[0])) > 1


def test_a_continuation_longer_than_the_window_is_refused() -> None:
    with pytest.raises(DataError, match="1 to 123 tokens"):
        SoftPromptLM(tiny("llama"), made(tiny("llama"))).loglikelihood(
            asked("loglikelihood", ("a", LONG)), disable_tqdm=True
        )


def test_running_text_and_chat_messages_do_not_go_into_a_template() -> None:
    model = SoftPromptLM(tiny("llama"), made(tiny("llama")), use_template=True)
    with pytest.raises(ConfigError, match="running text"):
        model.loglikelihood_rolling(asked("loglikelihood_rolling", ("a",)), disable_tqdm=True)
    with pytest.raises(ConfigError, match="chat template"):
        model.apply_chat_template([{"role": "user", "content": "hello"}])
    with pytest.raises(ConfigError, match="needs a soft prompt"):
        SoftPromptLM(tiny("llama"), use_template=True)


def test_rows_of_free_text_make_no_task() -> None:
    with pytest.raises(ConfigError, match="softprompt evaluate"):
        task_of_rows(made(tiny("llama")), rows(["a"], 2))


def test_messages_are_written_by_the_chat_template() -> None:
    tokenizer = make_tokenizer()
    lm = FrozenLM(make_model("llama"), tokenizer, name="tiny", dtype="fp32", device="cpu")
    messages = [{"role": "user", "content": "hello"}]
    with pytest.raises(TemplateError, match="leave it out"):
        SoftPromptLM(lm).apply_chat_template(messages)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        + "{% if add_generation_prompt %}bot:{% endif %}"
    )
    assert SoftPromptLM(lm).apply_chat_template(messages) == "user: hello\nbot:"
    assert SoftPromptLM(lm).chat_template(True) == tokenizer.chat_template
    assert SoftPromptLM(lm).tokenizer_name


def test_labels_and_their_words_are_the_verbalizers() -> None:
    lm = tiny("llama")
    soft = made(lm, verbalizer={"0": ("bad", "awful"), "1": ("good",)})
    found = SoftPromptLM(lm, soft, use_template=True).loglikelihood(
        asked("loglikelihood", ("a dull mess", "0"), ("a dull mess", " bad"), ("a dull mess", " awful")),
        disable_tqdm=True,
    )
    together = torch.logsumexp(torch.tensor([found[1][0], found[2][0]]), 0)
    assert found[0][0] == pytest.approx(float(together), rel=1e-5)
