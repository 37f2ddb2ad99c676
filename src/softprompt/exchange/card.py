"""The model card of a soft prompt on the Hugging Face Hub: metadata that the Hub reads, and a page for people."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from softprompt.drawing.words import markdown, markdown_table, number, shortened
from softprompt.exchange.check import Checked
from softprompt.exchange.peft_folder import HUB_IDS
from softprompt.exchange.readme import peft_code
from softprompt.files import local_path
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.soft_prompts.store import is_name
from softprompt.tasks.task import Task

METRICS = {
    "macro_f1": "f1",
    "token_f1": "f1",
    "mcc": "matthews_correlation",
    "rouge_l": "rouge",
    "bleu": "sacrebleu",
}
"""What the Hub calls metrics that have another name there."""

_SOMEWHERE = "path/to/the/base-model"
_LONGEST = 200


def hub_id(base: str) -> str | None:
    """What a base model is called on the Hub; None for a file or folder of this machine."""
    if base in HUB_IDS:
        return HUB_IDS[base]
    if local_path(base).exists() or base.lower().endswith(".gguf"):
        return None
    try:
        validate_repo_id(base)
    except HFValidationError:
        return None
    return base


def card_data(soft_prompt: SoftPrompt, has_peft: bool) -> ModelCardData:
    """The metadata: what kind of model it is, of which base model, and its metrics with n and interval.

    Args:
        soft_prompt: whose.
        has_peft: whether the files of PEFT are beside it.
    """
    base = hub_id(soft_prompt.base)
    kind = "text-generation" if soft_prompt.verbalizer is None else "text-classification"
    results = [_result(soft_prompt, kind, metric) for metric in _sound_metrics(soft_prompt)]
    tags = ["softprompt", "soft-prompt", "prompt-tuning" if soft_prompt.vectors.dim() == 2 else "prefix-tuning"]
    optional: dict[str, Any] = {}
    if base is not None:
        optional = {"base_model": base, "base_model_relation": "adapter"}
    if results:
        names = dict.fromkeys(result.metric_type for result in results)
        optional |= {"metrics": list(names), "eval_results": results, "model_name": soft_prompt.name}
    return ModelCardData(
        library_name="softprompt",
        pipeline_tag=kind,
        tags=[*tags, "peft"] if has_peft else tags,
        **optional,
    )


def card(
    task: Task,
    soft_prompt: SoftPrompt,
    repo: str,
    revision: str | None,
    *,
    checked: Checked | None = None,
    without_peft: str | None = None,
) -> str:
    """The whole README.md.

    Args:
        task: the soft prompt's task.
        soft_prompt: whose.
        repo: where it will be.
        revision: on which branch; None: the main one.
        checked: what the comparison with PEFT found.
        without_peft: why there are no files of PEFT; None: there are.
    """
    base = hub_id(soft_prompt.base)
    kind = "keys and values of every layer" if soft_prompt.vectors.dim() == 5 else "embeddings"
    what = soft_prompt.extent if soft_prompt.parts else f"{soft_prompt.extent}, {kind}"
    of = f"[{base}](https://huggingface.co/{base})" if base else "a base model that is not on the Hub"
    lines = [
        f"# {markdown(soft_prompt.name)}",
        "",
        f"A soft prompt for {of}: {what}.",
        "The base model stays as it is. It was made with [softprompt](https://pypi.org/project/softprompt).",
        "",
        *_about_base(soft_prompt, base),
        *_task(soft_prompt),
        *_quality(soft_prompt),
        "## Use with softprompt",
        "",
        *_with_softprompt(task, soft_prompt, repo, revision, base),
        "## Use with PEFT",
        "",
        *_with_peft(task, soft_prompt, repo, revision, base, checked, without_peft),
        "## Use with vLLM",
        "",
        *_with_vllm(task, soft_prompt, repo, base),
        *_training(soft_prompt),
    ]
    return f"---\n{card_data(soft_prompt, without_peft is None).to_yaml()}\n---\n\n" + "\n".join(lines).rstrip() + "\n"


def _sound_metrics(soft_prompt: SoftPrompt) -> Iterator[Mapping[str, Any]]:
    return (metric for metric in soft_prompt.metrics if isinstance(metric.get("value"), int | float))


def _result(soft_prompt: SoftPrompt, kind: str, metric: Mapping[str, Any]) -> EvalResult:
    name, split = str(metric["metric"]), str(metric["split"])
    source = str((soft_prompt.data.get(split) or {}).get("source", ""))
    dataset = _dataset(source)
    return EvalResult(
        task_type=kind,
        dataset_type=dataset,
        dataset_name=f"{split} rows of {dataset}",
        dataset_split=split,
        metric_type=METRICS.get(name, name),
        metric_value=metric["value"],
        metric_name=f"{name} ({_certainty(metric)})",
        metric_config="macro" if name == "macro_f1" else None,
    )


def _dataset(source: str) -> str:
    """A data source's name without the folders of this machine: ``hf:sst2:test`` → ``sst2``."""
    source = source.removeprefix("held out of ")
    if source.startswith("hf:"):
        return source.removeprefix("hf:").partition(":")[0]
    return re.split(r"[/\\]", source)[-1] or "unnamed"


def _certainty(metric: Mapping[str, Any]) -> str:
    name, ends = str(metric["metric"]), [metric.get("low"), metric.get("high")]
    if all(isinstance(end, int | float) for end in ends):
        return f"n = {metric['n']:,}, 95 % interval {number(name, ends[0])} to {number(name, ends[1])}"
    if isinstance(metric.get("stderr"), int | float):
        return f"n = {metric['n']:,}, standard error {number(name, metric['stderr'])}"
    return f"n = {metric['n']:,}"


def _about_base(soft_prompt: SoftPrompt, base: str | None) -> list[str]:
    if base is None:
        return [
            "The base model was a file or folder on the machine of its training. A copy of the same weights is needed:",
            f"fingerprint `{soft_prompt.base_fingerprint}`.",
            "",
        ]
    if base != soft_prompt.base:
        return [
            f"It was trained on what softprompt calls `{soft_prompt.base}`, a quantised copy of `{base}`; on the",
            "original weights its answers may differ a little.",
            "",
        ]
    return []


def _task(soft_prompt: SoftPrompt) -> list[str]:
    lines = ["## Task", "", "Template:", "", *_fenced(soft_prompt.template)]
    if soft_prompt.verbalizer is None:
        return [*lines, "It answers with free text.", ""]
    rows = [(_line(label), ", ".join(map(_line, words))) for label, words in soft_prompt.verbalizer.items()]
    return [*lines, "It answers with one of these labels:", "", *markdown_table(("label", "words"), rows)]


def _quality(soft_prompt: SoftPrompt) -> list[str]:
    rows = []
    for metric in _sound_metrics(soft_prompt):
        name = str(metric["metric"])
        rows.append((name, str(metric["split"]), number(name, metric["value"]), _certainty(metric)))
    if not rows:
        return ["## Quality", "", "Its file holds no metrics.", ""]
    lines = ["## Quality", "", *markdown_table(("metric", "rows", ">value", "certainty"), rows)]
    if any(row[1] == "validation" for row in rows):
        lines += [
            "The best step was chosen by the validation rows, so what they show is a little better than what other "
            "rows would show.",
            "",
        ]
    return lines


def _with_softprompt(
    task: Task, soft_prompt: SoftPrompt, repo: str, revision: str | None, base: str | None
) -> list[str]:
    fields, called = task.template.fields, _called(soft_prompt, repo)
    example = "A text." if len(fields) == 1 else dict.fromkeys(fields, "A text.")
    shown = example if isinstance(example, str) else json.dumps(example)
    name = "" if called == repo.rpartition("/")[2] else f" --name {called}"
    where = "" if revision is None else f" --revision {shlex.quote(revision)}"
    at = "" if revision is None else f", revision={revision!r}"
    shell = [
        "pip install softprompt",
        f"softprompt pull {repo}{name}{where}",
        f"softprompt predict {called} {shlex.quote(shown)}" + ("" if base else f" --base {_SOMEWHERE}"),
    ]
    python = [
        "import softprompt as sp",
        "",
        f"lm = sp.load_model({(soft_prompt.base if base else _SOMEWHERE)!r})",
        f"prompt = sp.pull({repo!r}{at})",
        f"print(sp.predict(lm, prompt, [{example!r}])[0])",
    ]
    return [*_fenced("\n".join(shell), "sh"), *_fenced("\n".join(python), "python")]


def _with_peft(
    task: Task,
    soft_prompt: SoftPrompt,
    repo: str,
    revision: str | None,
    base: str | None,
    checked: Checked | None,
    without_peft: str | None,
) -> list[str]:
    if without_peft is not None:
        return [
            "There are no files for PEFT, since this soft prompt has no exact form there:",
            "",
            f"> {markdown(without_peft)}",
            "",
        ]
    at = "" if revision is None else f", revision={revision!r}"
    code = peft_code(base or _SOMEWHERE, task, f"PeftModel.from_pretrained(model, {repo!r}{at})")
    lines = ["Tokenise the text so, piece by piece and without special tokens:", "", *_fenced(code.rstrip(), "python")]
    if task.encoder.before_soft_prompt:
        lines += [
            f"The first {len(task.encoder.before_soft_prompt)} virtual tokens there are what stands before the soft "
            "prompt in its template. Do not put them, or a beginning-of-sequence token, before the text again.",
            "",
        ]
    lines += [f"When it was pushed: {checked}." if checked else "It was not compared with PEFT when it was pushed.", ""]
    return lines


def _with_vllm(task: Task, soft_prompt: SoftPrompt, repo: str, base: str | None) -> list[str]:
    if task.lm.encoder_decoder:
        return ["vLLM serves no encoder–decoders.", ""]
    if soft_prompt.vectors.dim() != 2:
        return ["vLLM takes no trained keys and values, and no states.", ""]
    ours = shlex.quote(soft_prompt.base) if base else _SOMEWHERE
    theirs = ours if base == soft_prompt.base else _SOMEWHERE
    lines = [
        f"vllm serve {theirs} --enable-prompt-embeds --enable-prompt-tokens-details",
        f"softprompt serve --prompts {_called(soft_prompt, repo)} --base {ours} --port 8080 \\",
        "    --backend vllm --upstream http://localhost:8000",
    ]
    return ["vLLM computes, and softprompt stands before it:", "", *_fenced("\n".join(lines), "sh")]


def _called(soft_prompt: SoftPrompt, repo: str) -> str:
    """What it shall be called in a store: as it is, or as its repository where that is no name of a store."""
    return soft_prompt.name if is_name(soft_prompt.name) else repo.rpartition("/")[2]


def _training(soft_prompt: SoftPrompt) -> list[str]:
    settings = {key: value for key, value in soft_prompt.training.items() if isinstance(value, str | int | float)}
    rows = [(key, _line(str(value))) for key, value in settings.items()]
    for split, about in soft_prompt.data.items():
        if isinstance(about, Mapping) and "rows" in about:
            rows.append((f"{split} data", f"{about['rows']} rows of {_dataset(str(about.get('source', '')))}"))
    rows += [(f"{name} version", version) for name, version in soft_prompt.versions.items()]
    rows += [("created", soft_prompt.created)] if soft_prompt.created else []
    return ["## Training", "", *markdown_table(("setting", "value"), rows)] if rows else []


def _line(text: str) -> str:
    """A text in one line that Markdown keeps: with signs for line ends and blanks at its ends."""
    plain = text == " ".join(text.split())
    return shortened(text if plain else repr(text), _LONGEST)


def _fenced(text: str, language: str = "") -> list[str]:
    """A block of code behind a fence that the text does not hold."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}{language}", text, fence, ""]
