"""``softprompt lm-eval``. Most tests are skipped where the harness is not installed: ``pip install -e ".[eval]"``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from softprompt.soft_prompts.soft_prompt import SoftPrompt
from tests.conftest import SENTENCES, Run, make_model, make_tokenizer

PLACE = ("--device", "cpu", "--dtype", "fp32")
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {rows}}}
  cache_dir: {cache}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}\\nIt is"
doc_to_choice: [bad, good]
doc_to_target: gold
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def write_task(folder: Path, name: str = "films") -> str:
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"text": text, "gold": number % 2}) for number, text in enumerate(SENTENCES * 3)]
    (folder / "films.jsonl").write_text("\n".join(lines), encoding="utf-8")
    text = TASK.format(name=name, rows=folder / "films.jsonl", cache=folder / "cache")
    (folder / "films.yaml").write_text(text, encoding="utf-8")
    return str(folder / "films.yaml")


@pytest.fixture
def few_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness without its own tasks, whose list takes seconds to read."""
    tasks = pytest.importorskip("lm_eval.tasks")
    manager = tasks.TaskManager

    def bare(*_: Any, include_path: Any = None, **__: Any) -> Any:
        return manager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(tasks, "TaskManager", bare)


@pytest.mark.usefixtures("few_tasks")
def test_a_task_from_a_file_is_measured_with_and_without(run: Run, train: Run, base: str, tmp_path: Path) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    path = write_task(tmp_path / "tasks")
    train("train.jsonl", "--name", "films")
    ran = run("lm-eval", "--tasks", path, "--base-only", "--json", "films", *PLACE)
    own = lm_eval.simple_evaluate(HFLM(pretrained=base, device="cpu", dtype="float32"), tasks=[path])
    assert ran.json["results"]["films"] == pytest.approx(own["results"]["films"], nan_ok=True)
    assert (ran.json["base_only"], ran.json["num_virtual_tokens"]) == (True, 0)
    tuned = run("lm-eval", "films", "--tasks", path, "--json", *PLACE).json
    run("export", "films", "out", *PLACE)
    there = HFLM(pretrained=base, device="cpu", dtype="float32", peft="out")
    exported = lm_eval.simple_evaluate(there, tasks=[path])["results"]["films"]
    assert tuned["results"]["films"] == pytest.approx(exported, nan_ok=True)
    assert tuned["num_virtual_tokens"] == 64
    told = run("lm-eval", "films", "--tasks", path, "--num-fewshot", "1", "--limit", "4", *PLACE)
    assert told.code == 0
    assert told.out.splitlines()[2].split()[:2] == ["films", "acc"]
    assert told.out.split()[-2:] == ["1", "4"]


@pytest.mark.usefixtures("few_tasks")
def test_an_exported_folder_gives_the_harness_the_same_log_likelihoods(
    run: Run, train: Run, base: str, home: Path
) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    import softprompt as sp
    from softprompt.evaluation.lm_eval import SoftPromptLM

    train("train.jsonl", "--name", "films", "--num-virtual-tokens", "5")
    run("export", "films", "out", *PLACE)
    pairs = [(text, end) for text in SENTENCES for end in (" good", " bad", " one of the best")]
    asked = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    ours = SoftPromptLM(sp.load_model(base, dtype="fp32", device="cpu"), SoftPrompt.load(home / "films.safetensors"))
    theirs = HFLM(pretrained=base, device="cpu", dtype="float32", peft="out")
    found, wanted = (model.loglikelihood(asked, disable_tqdm=True) for model in (ours, theirs))
    assert [one for one, _ in found] == pytest.approx([one for one, _ in wanted], rel=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]


def test_an_exported_beginning_of_sequence_token_is_not_to_be_put_twice(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    import softprompt as sp
    from softprompt.evaluation.lm_eval import SoftPromptLM

    folder, tokenizer = tmp_path / "base", make_tokenizer()
    tokenizer.bos_token = "<pad>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 0)])
    make_model("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    lm = sp.load_model(folder, dtype="fp32", device="cpu")
    assert lm.tokenizer("a").input_ids[0] == 0
    prompt = SoftPrompt(
        vectors=0.15 * torch.randn(4, 32, generator=torch.Generator().manual_seed(1)),
        name="made",
        base=lm.name,
        base_fingerprint=lm.fingerprint,
        tokenizer_fingerprint=lm.tokenizer_fingerprint,
        template="{soft_prompt}{input} {target}",
    )
    sp.export(lm, prompt, tmp_path / "out")
    asked = [Instance("loglikelihood", {}, (text, " good"), number) for number, text in enumerate(SENTENCES)]
    options = {"device": "cpu", "dtype": "float32", "peft": str(tmp_path / "out"), "add_bos_token": False}
    found = SoftPromptLM(lm, prompt).loglikelihood(asked, disable_tqdm=True)
    wanted = HFLM(pretrained=str(folder), **options).loglikelihood(asked, disable_tqdm=True)
    assert [one for one, _ in found] == pytest.approx([one for one, _ in wanted], rel=1e-5)


@pytest.mark.usefixtures("few_tasks")
@pytest.mark.parametrize("more", [(), ("--base-only",)])
def test_rows_of_ones_own_give_the_accuracy_of_evaluate(
    run: Run, train: Run, caplog: pytest.LogCaptureFixture, more: tuple[str, ...]
) -> None:
    train("train.jsonl", "--name", "films")
    ran = run("lm-eval", "films", "--data", "test.jsonl", "--json", *more, *PLACE)
    assert [record for record in caplog.records if "--metadata" in record.message] == []  # is for authors of tasks
    found = ran.json["results"]["test"]
    wanted = run("evaluate", "films", "test.jsonl", "--json", *more, *PLACE).json
    assert found["acc,none"] == pytest.approx(wanted["value"])


@pytest.mark.usefixtures("few_tasks", "no_model", "stored")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--tasks", "film"), "no task 'film', and there is no such file; did you mean films?"),
        (("--tasks", "hellaswagg.yaml"), "no such file; see `lm-eval ls tasks`"),
        (("--tasks", "train.jsonl"), "could not be loaded"),
        (("--tasks", "broken"), "could not be loaded"),
        (("--tasks", "films", "--include-path", "nowhere"), "--include-path must be a folder"),
        (("--data", "nothing.jsonl"), "nothing.jsonl"),
        (("--data", "test.jsonl", "--target-field", "input"), "test.jsonl:1"),
    ],
)
def test_tasks_that_there_are_not_are_told_before_the_model_is_loaded(
    run: Run, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    write_task(tmp_path / "tasks")
    write_task(tmp_path / "tasks" / "inner", "broken")
    (tmp_path / "tasks" / "inner" / "films.jsonl").unlink()
    if "--include-path" not in arguments:
        arguments = (*arguments, "--include-path", "tasks")
    ran = run("lm-eval", "films", *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert words in ran.err


@pytest.mark.usefixtures("no_model", "stored")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "give --tasks or --data"),
        (("--tasks", "a", "--data", "test.jsonl"), "give --tasks or --data"),
        (("--data", "test.jsonl", "--num-fewshot", "2"), "leave --num-fewshot"),
        (("--data", "test.jsonl", "--template"), "--template out"),
        (("--tasks", "a", "--template", "--chat-template"), "leave one out"),
        (("--tasks", "a", "--limit", "0"), "--limit"),
        (("--tasks", "a", "--limit", "2.5"), "--limit"),
        (("--tasks", "a", "--limit", "nan"), "--limit"),
    ],
)
def test_options_that_contradict_each_other_are_refused(run: Run, arguments: tuple[str, ...], words: str) -> None:
    ran = run("lm-eval", "films", *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert words in ran.err


@pytest.mark.usefixtures("no_model", "stored")
def test_without_the_harness_one_sentence_says_how_to_get_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "softprompt.evaluation.lm_eval", raising=False)
    ran = run("lm-eval", "films", "--data", "test.jsonl")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.count("\n") == 1
    assert 'pip install "softprompt[eval]"' in ran.err
