"""The ten lines, on a tiny model."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pandas
import pytest
import torch

import softprompt as sp
from softprompt.data.sources import ROWS
from softprompt.errors import BaseModelError, ConfigError, DataError, SoftPromptError, SoftPromptWarning
from softprompt.model.frozen import FrozenLM
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.tasks.predict import Query
from softprompt.tasks.predict import predict as answer_queries
from softprompt.tasks.task import Task
from softprompt.tuning.gradients import Gradients
from tests.conftest import make_model, make_tokenizer, tiny

UNTYPED: Any = sp
"""The package as callers see it who have no type checker."""
SETTINGS: dict[str, Any] = {"steps": 6, "eval_every": 3, "batch_size": 4, "num_virtual_tokens": 5, "progress": False}


def rows(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [
        {"input": f"a {('great', 'bad')[i % 2]} film {i}", "target": ("positive", "negative")[i % 2]}
        for i in range(first, first + count)
    ]


@pytest.fixture(scope="module")
def lm() -> FrozenLM:
    return tiny("llama")


@pytest.fixture(scope="module")
def prompt(lm: FrozenLM) -> SoftPrompt:
    return sp.train(lm, rows(40), validation=rows(12, 40), name="films", **SETTINGS)


def refused(kind: type[SoftPromptError], call: Callable[[], Any], *said: str) -> None:
    with pytest.raises(kind) as error:
        call()
    assert [word for word in said if word not in str(error.value)] == []


# --- load_model ----------------------------------------------------------------------------------


def test_a_loaded_model_is_frozen_and_answers_as_before() -> None:
    model, tokenizer = make_model("llama").train(), make_tokenizer()
    ids = torch.tensor([tokenizer("a dull , badly written mess")["input_ids"]])
    with torch.no_grad():
        before = model.eval()(ids).logits
    lm = sp.load_model(model, tokenizer, name="mine")
    assert lm.name == "mine"
    assert lm.model is model
    assert not model.training
    assert not any(weight.requires_grad for weight in model.parameters())
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, before, atol=1e-6)


def test_a_loaded_model_keeps_dtype_and_device_unless_told() -> None:
    assert sp.load_model(make_model("llama").double().float(), make_tokenizer()).dtype == torch.float32
    assert sp.load_model(make_model("llama").to(torch.bfloat16), make_tokenizer()).dtype == torch.bfloat16
    assert sp.load_model(make_model("llama"), make_tokenizer(), dtype="bf16").dtype == torch.bfloat16


def test_a_copy_leaves_the_model_as_it_is() -> None:
    model = make_model("llama").train()
    lm = sp.load_model(model, make_tokenizer(), copy=True)
    assert lm.model is not model
    assert model.training
    assert all(weight.requires_grad for weight in model.parameters())


def test_a_model_may_be_loaded_twice(prompt: SoftPrompt) -> None:
    model, tokenizer = make_model("llama"), make_tokenizer()
    once = sp.load_model(model, tokenizer)
    wanted = sp.predict(once, prompt, ["a great film"])
    assert sp.predict(sp.load_model(model, tokenizer), prompt, ["a great film"]) == wanted


def test_a_folder_is_a_model(base: str, lm: FrozenLM, prompt: SoftPrompt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(base).parent)
    loaded = sp.load_model(Path(base).name, dtype="fp32")
    assert loaded.name == str(Path(base).resolve())
    assert sp.predict(loaded, prompt, "a great film") == sp.predict(lm, prompt, "a great film")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (lambda: (make_model("llama"),), "without a tokenizer"),
        (lambda: (3, make_tokenizer()), "found a int"),
        (lambda: ("smollm2-135m", make_tokenizer()), "loaded already"),
    ],
)
def test_what_is_no_model_is_refused(arguments: Callable[[], Any], said: str) -> None:
    refused(ConfigError, lambda: sp.load_model(*arguments()), said)


def test_a_model_with_an_adapter_is_refused() -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(make_model("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    refused(ConfigError, lambda: sp.load_model(adapted, make_tokenizer()), "PEFT", "merge_and_unload")


# --- train ---------------------------------------------------------------------------------------


def test_training_finds_labels_and_template_and_remembers_them(prompt: SoftPrompt) -> None:
    assert prompt.name == "films"
    assert list(prompt.verbalizer or ()) == ["negative", "positive"]
    assert prompt.vectors.shape == (5, 32)
    assert prompt.training["steps_done"] == 6
    assert prompt.data["validation"]["rows"] == 12


def test_data_may_be_rows_a_table_or_a_file(lm: FrozenLM, prompt: SoftPrompt, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, rows(40))))
    sources = [path, str(path), pandas.DataFrame(rows(40)), datasets.Dataset.from_list(rows(40)), tuple(rows(40))]
    for source in sources:
        found = sp.train(lm, source, validation=pandas.DataFrame(rows(12, 40)), name="films", **SETTINGS)
        assert torch.equal(found.vectors, prompt.vectors)
        assert found.data["train"]["fingerprint"] == prompt.data["train"]["fingerprint"]


def test_it_equals_the_loop_over_training(lm: FrozenLM, prompt: SoftPrompt) -> None:
    data = sp.read_dataset(rows(40), fields=["input"])
    held_out = sp.read_dataset(rows(12, 40), fields=["input"])
    task = Task.for_data(lm, data, sp.default_template(True), num_virtual_tokens=5)
    training = sp.Training(task, data, held_out, sp.TrainConfig(steps=6, eval_every=3, batch_size=4))
    for _ in training:
        pass
    assert torch.equal(training.result().vectors, prompt.vectors)


@pytest.mark.parametrize(
    "labels",
    [
        "negative,positive",
        ["negative", "positive"],
        {"negative": "negative", "positive": ["positive"]},
        sp.Verbalizer.from_labels(["negative", "positive"]),
        "all",
    ],
)
def test_labels_may_be_said_in_many_forms(lm: FrozenLM, prompt: SoftPrompt, labels: Any) -> None:
    found = sp.train(lm, rows(40), validation=rows(12, 40), labels=labels, **SETTINGS)
    assert torch.equal(found.vectors, prompt.vectors)


def test_labels_can_be_free_text_to_be_generated(lm: FrozenLM) -> None:
    found = sp.train(lm, rows(40), labels="none", **SETTINGS)
    assert found.verbalizer is None
    [answer] = sp.predict(lm, found, ["a great film"])
    assert answer.logprobs is None
    assert str(answer) == answer.text


def test_settings_count_for_more_than_a_config(lm: FrozenLM) -> None:
    config = sp.TrainConfig(steps=99, lr=0.1, num_virtual_tokens=3)
    found = sp.train(lm, rows(40), config=config, steps=2, progress=False)
    assert (found.training["steps"], found.training["lr"], found.num_virtual_tokens) == (2, 0.1, 3)


def test_a_training_goes_on_from_a_soft_prompt(lm: FrozenLM, prompt: SoftPrompt) -> None:
    settings = {**SETTINGS, "num_virtual_tokens": None, "lr": 1e-9, "steps": 1}
    found = sp.train(lm, rows(40), start=prompt, **settings)
    assert torch.allclose(found.vectors, prompt.vectors, atol=1e-6)
    other = tiny("qwen2")
    refused(BaseModelError, lambda: sp.train(other, rows(40), start=prompt, progress=False))


def test_a_training_that_was_stopped_is_gone_on_with(
    lm: FrozenLM, prompt: SoftPrompt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(Exception):
        pass

    settings = {**SETTINGS, "checkpoint_every": 1}
    iterate = sp.Training.__iter__

    def first_steps(training: sp.Training) -> Any:
        for step in iterate(training):
            yield step
            if step.number == 2:
                raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(sp.Training, "__iter__", first_steps)
        with pytest.raises(Stopped):
            sp.train(lm, rows(40), validation=rows(12, 40), folder=tmp_path / "run", **settings)
    found = sp.train(lm, rows(40), validation=rows(12, 40), folder=str(tmp_path / "run"), resume=True, **settings)
    assert torch.equal(found.vectors, prompt.vectors)


def test_progress_is_shown_on_stderr_only(lm: FrozenLM, capsys: pytest.CaptureFixture[str]) -> None:
    sp.train(lm, rows(40), **{**SETTINGS, "progress": True})
    out, err = capsys.readouterr()
    assert out == ""
    assert "40 rows, 2 labels" in err
    assert "validation accuracy" in err
    sp.train(lm, rows(40), **SETTINGS)
    assert capsys.readouterr() == ("", "")


def test_doubts_about_data_are_warnings_without_progress(lm: FrozenLM) -> None:
    with pytest.warns(SoftPromptWarning, match="different targets"):
        sp.train(lm, [*rows(40), {"input": rows(1)[0]["input"], "target": "negative"}], **SETTINGS)


def test_a_loss_that_is_not_finite_is_told(lm: FrozenLM, monkeypatch: pytest.MonkeyPatch) -> None:
    add, times = Gradients.add, iter(range(100))

    def poisoned(*given: Any) -> torch.Tensor:
        losses = add(*given)
        return losses * math.nan if next(times) == 3 else losses

    monkeypatch.setattr(Gradients, "add", poisoned)
    with pytest.warns(SoftPromptWarning, match="not finite") as told:
        found = sp.train(lm, rows(40), **SETTINGS)
    assert any("lr below" in str(warning.message) for warning in told)
    assert found.vectors.isfinite().all()
    assert found.training["steps_done"] == 3


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"learning_rate": 1}, ConfigError, ("learning_rate", "lr")),
        ({"template": "{input} {target}"}, ConfigError, ("{soft_prompt}",)),
        ({"input_field": "text"}, DataError, ('"text"', "input_field")),
        ({"labels": ["good", "bad"]}, DataError, (f"{ROWS}:1", "good")),
        ({"labels": ["a", "b"], "references_field": "target"}, ConfigError, ("references",)),
    ],
)
def test_mistakes_are_sentences(lm: FrozenLM, options: dict[str, Any], kind: Any, said: tuple[str, ...]) -> None:
    wanted = tuple(word.replace("input_field", "input-field") for word in said)
    refused(kind, lambda: sp.train(lm, rows(40), **SETTINGS, **options), *wanted)


# --- evaluate and predict ------------------------------------------------------------------------


def test_an_evaluation_prints_its_headline(lm: FrozenLM, prompt: SoftPrompt) -> None:
    found = sp.evaluate(lm, prompt, rows(20), progress=False)
    right = sum(one.text == row["target"] for one, row in zip(found.predictions, rows(20), strict=True))
    assert str(found).startswith(f"accuracy {right / 20:.4f} ± ")
    assert str(found).endswith(" (n = 20)")
    html = found._repr_html_()
    assert html.count("<tr>") == 6
    assert "<td>macro_f1</td>" in html
    alone = sp.evaluate(lm, prompt, rows(1), metrics=["accuracy", "log_loss"], progress=False)
    assert "<td>–</td>" in alone._repr_html_()


def test_the_base_model_alone_is_measured_with_the_same_template(lm: FrozenLM, prompt: SoftPrompt) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SoftPromptWarning)
        found = sp.evaluate(lm, prompt, rows(20), base_only=True, progress=False)
    task = Task.of(lm, prompt).without_soft_prompt()
    examples = sp.read_dataset(rows(20), fields=["input"]).examples
    assert list(found.predictions) == answer_queries([Query(task, example) for example in examples])


def test_predictions_print_as_a_list(lm: FrozenLM, prompt: SoftPrompt) -> None:
    found = sp.predict(lm, prompt, ["a great film", "a bad film"])
    one, other = found
    assert str(found) == f"[{one.text} {one.probability:.2f}, {other.text} {other.probability:.2f}]"
    assert repr(found) == str(found)
    assert one.probability == pytest.approx((one.probabilities or {})[one.text])
    assert found._repr_html_().count("<tr>") == 3


def test_a_mixed_batch_equals_one_soft_prompt_at_a_time(lm: FrozenLM, prompt: SoftPrompt) -> None:
    other = sp.train(lm, rows(40), name="other", **{**SETTINGS, "num_virtual_tokens": 3})
    mixed = sp.predict(lm, [(prompt, "a great film"), (other, "a bad film"), (prompt, "the plot")])
    singly = [sp.predict(lm, prompt, "a great film"), sp.predict(lm, other, "a bad film")]
    singly.append(sp.predict(lm, prompt, "the plot"))
    for found, [wanted] in zip(mixed, singly, strict=True):
        assert found.text == wanted.text
        assert list((found.logprobs or {}).values()) == pytest.approx(list((wanted.logprobs or {}).values()), abs=1e-5)


def test_inputs_may_be_a_file_or_fields(lm: FrozenLM, prompt: SoftPrompt, tmp_path: Path) -> None:
    path = tmp_path / "texts.csv"
    path.write_text("input\na great film\na bad film\n")
    wanted = sp.predict(lm, prompt, ["a great film", "a bad film"])
    assert sp.predict(lm, prompt, path) == wanted
    assert sp.predict(lm, prompt, [{"input": "a great film"}, {"input": "a bad film", "more": "x"}]) == wanted
    assert sp.predict(lm, prompt, []) == ()


def test_a_path_as_text_is_asked_about(lm: FrozenLM, prompt: SoftPrompt, tmp_path: Path) -> None:
    path = tmp_path / "texts.csv"
    path.write_text("input\na great film\n")
    refused(DataError, lambda: sp.predict(lm, prompt, str(path)), "Path(")
    assert len(sp.predict(lm, prompt, ["no-such.csv"])) == 1


@pytest.mark.parametrize(
    ("call", "kind", "said"),
    [
        (lambda lm, prompt: UNTYPED.predict(lm, prompt), ConfigError, "inputs"),
        (lambda lm, prompt: UNTYPED.predict(lm, "films", ["a"]), ConfigError, "SoftPrompt.load"),
        (lambda lm, prompt: UNTYPED.predict(lm, prompt, ["a", " "]), DataError, "input 2"),
        (lambda lm, prompt: UNTYPED.predict(lm, prompt, ["a", 3]), DataError, "input 2"),
        (lambda lm, prompt: UNTYPED.predict(lm, prompt, [{"text": "a"}]), DataError, "input 1"),
        (lambda lm, prompt: UNTYPED.predict([], prompt, ["a"]), ConfigError, "load_model"),
        (lambda lm, prompt: UNTYPED.evaluate(None, prompt, rows(2)), ConfigError, "load_model"),
        (lambda lm, prompt: UNTYPED.evaluate(lm, prompt, rows(2), metrics=["bleu"]), ConfigError, "bleu"),
        (lambda lm, prompt: UNTYPED.evaluate(tiny("qwen2"), prompt, rows(2)), BaseModelError, "films"),
        (lambda lm, prompt: UNTYPED.evaluate(lm, prompt, [{"input": "a", "target": "x"}]), DataError, "rows:1"),
    ],
)
def test_mistakes_in_asking_are_sentences(
    lm: FrozenLM, prompt: SoftPrompt, call: Callable[..., Any], kind: type[SoftPromptError], said: str
) -> None:
    refused(kind, lambda: call(lm, prompt), said)


# --- what is shown -------------------------------------------------------------------------------


def test_a_soft_prompt_and_a_model_say_what_they_are(lm: FrozenLM, prompt: SoftPrompt) -> None:
    assert "films: 5 virtual tokens" in repr(prompt)
    assert "accuracy" in repr(prompt)
    html = prompt._repr_html_()
    assert "<td>negative, positive</td>" in html
    assert "<td>160 (640 B)</td>" in html
    assert f"{lm.num_parameters:,} weights, float32, cpu" in repr(lm)


# --- save, load, serve ---------------------------------------------------------------------------


def test_a_soft_prompt_is_saved_and_loaded_by_path(lm: FrozenLM, prompt: SoftPrompt, tmp_path: Path) -> None:
    for path in (tmp_path / "one.safetensors", str(tmp_path / "other.safetensors")):
        prompt.save(path)
        again = sp.SoftPrompt.load(path)
        assert again.template == prompt.template
        assert torch.equal(again.vectors, prompt.vectors)
        assert sp.predict(lm, again, "a great film") == sp.predict(lm, prompt, "a great film")
        assert torch.equal(sp.load(path).vectors, prompt.vectors)


def test_soft_prompts_are_served_until_the_server_is_closed(lm: FrozenLM, prompt: SoftPrompt, tmp_path: Path) -> None:
    path = tmp_path / "again.safetensors"
    prompt.save(path)
    with sp.serve(lm, {"sst2": prompt, "again": path}, port=0, block=False) as server:
        answers = [
            httpx.post(f"{server.url}/v1/classify", json={"model": name, "input": "a great film"}).json()
            for name in ("sst2", "again")
        ]
        [wanted] = sp.predict(lm, prompt, "a great film")
        for answer in answers:
            assert answer["data"][0]["label"] == wanted.text
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")


def test_a_port_that_is_taken_is_told(lm: FrozenLM, prompt: SoftPrompt) -> None:
    with sp.serve(lm, {"sst2": prompt}, port=0, block=False) as server:
        port = int(server.url.rpartition(":")[2])
        refused(ConfigError, lambda: sp.serve(lm, {"sst2": prompt}, port=port, block=False), str(port))
