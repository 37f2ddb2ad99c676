"""The same task by every method: same rows, same template, same scoring, same time to learn.

A comparison is a list of cells, one for each base model, method and seed. Each is written down as it finishes, with its
predictions, so that a comparison that was stopped goes on where it was, and cells can be added later.
"""

from __future__ import annotations

import gc
import json
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from softprompt.compare.comparison_time import Speed
from softprompt.compare.measure import lm_bytes, peak_memory, plain_perplexity
from softprompt.compare.plan import Key, Plan
from softprompt.errors import BaseModelError, ConfigError, SoftPromptError
from softprompt.evaluation.evaluate import (
    headline,
    headline_difference,
    label_metrics,
    most_frequent_answer,
)
from softprompt.evaluation.metrics import Metric
from softprompt.files import StrPath, atomic_writer, finite, local_path
from softprompt.methods.problem import Learned, Problem, affordable_rows
from softprompt.methods.registry import METHODS, OURS
from softprompt.model.frozen import FrozenLM
from softprompt.soft_prompts import artifact
from softprompt.soft_prompts.metadata import library_versions
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.tasks.predict import Prediction

BESIDE_ACCURACY = ("macro_f1", "mcc")
"""What labels are measured by besides the headline: accuracy hides that a rare label is never found."""


class Comparison:
    """The cells of a plan in a folder: those that are done, and those to be run.

    Attributes:
        plan: what is compared.
        folder: holds ``results.json``, ``predictions/`` and ``soft-prompts/``.
        cells: what is known so far, in the order of the methods, as JSON values.
    """

    def __init__(
        self,
        plan: Plan,
        folder: StrPath,
        load: Callable[[str], FrozenLM],
        notice: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Opens a folder, which may hold earlier cells of the same task.

        Args:
            plan: what to compare.
            folder: made if it is not there.
            load: loads a base model by its id, anew each time.
            notice: is told what is being done, in a few words.

        Raises:
            ConfigError: the folder holds results of another task, other data or another budget.
        """
        self.plan, self.folder, self._load, self._notice = plan, local_path(folder), load, notice
        self._loaded: tuple[str, FrozenLM, float] | None = None
        self._checked = False
        self._rows_of_base: dict[str, int] = {}
        self._speeds: dict[str, Speed] = {}
        self._plain_seconds = 0.0
        self.cells: list[dict[str, Any]] = _read_cells(self.folder / "results.json")
        for cell in self.cells:
            theirs = {"task": cell["task"], "metric": cell.get("metric", plan.metric), **cell["identity"]}
            known = cell["method"] if cell["method"] in plan.methods else OURS
            ours = {"task": plan.task, "metric": plan.metric, **plan.identity(known)}
            if differing := [key for key in ours if theirs.get(key) != ours[key]]:
                raise ConfigError(
                    f"The folder {folder} holds results of a comparison with other {', '.join(differing)}; "
                    f"choose another --out, or repeat that comparison's options."
                )

    def todo(self) -> list[Key]:
        """The plan's cells that are not done, in the order in which to run them."""
        done = {_key(cell) for cell in self.cells if cell["status"] == "done"}
        return [key for key in self.plan.keys if key not in done]

    def speeds(self) -> dict[str, Speed]:
        """What each base model that there are cells for takes here; loads each of them once, if none was run yet.

        A base model that cannot answer the test rows has none: its cells will tell why.

        Raises:
            BaseModelError: a base model cannot be loaded.
        """
        self._check_bases(timed=True)
        return dict(self._speeds)

    def run(self, key: Key) -> dict[str, Any]:
        """Runs one cell, keeps what came of it, and returns it.

        A method that finds too little memory, or numbers that are not finite, or that says itself what is wrong, makes
        a cell with status ``failed`` and its reason; the next try runs it again. ``seconds`` is all that it took.

        Raises:
            BaseModelError: before the first cell, a base model of the plan cannot be loaded.
        """
        self._check_bases()
        began = time.perf_counter()
        torch.compiler.reset()  # it keeps few graphs of a function; beyond, layers would run uncompiled without a word
        try:
            cell = self._measured(key, *self._base(key.base))
        except (SoftPromptError, FloatingPointError, RuntimeError, MemoryError) as error:
            if isinstance(error, RuntimeError) and not _may_happen(error):
                raise  # a mistake of ours, which must not look like a method that does not work
            reason = str(error) or type(error).__name__
            cell = {"status": "failed", "reason": " ".join(reason.split())[:300], "value": None}
        cell = {"task": self.plan.task, "method": key.method, "base": key.base, "seed": key.seed, **cell}
        cell |= {"budget_seconds": self.plan.budget, "identity": self.plan.identity(key.method)}
        cell["versions"] = library_versions()
        self.cells = [other for other in self.cells if _key(other) != key] + [cell]
        order = {method: place for place, method in enumerate(METHODS)}
        self.cells.sort(key=lambda one: (one["base"], order[one["method"]], one["seed"]))
        self._compare_with_ours()
        cell["seconds"] = round(time.perf_counter() - began, 1)
        _write_json(self.folder / "results.json", self.cells)
        return cell

    def _check_bases(self, timed: bool = False) -> None:
        """Loads and asks each base model that there are cells for once, the first of them last: it is used next."""
        if self._checked:
            return
        bases = list(dict.fromkeys(key.base for key in self.todo()))
        for base in reversed(bases):
            self._notice(f"checking that {base} can be loaded")
            try:
                began = time.perf_counter()
                lm, _ = self._base(base)
                self._require_weights(base, lm)
                if timed:
                    self._time(base, lm, time.perf_counter() - began)
            except (RuntimeError, MemoryError) as error:
                if isinstance(error, RuntimeError) and not _may_happen(error):
                    raise
                raise BaseModelError(
                    f"The base model {base} does not fit into memory here ({' '.join(str(error).split())[:200]}); "
                    f"leave it out of --bases, or choose another --dtype or --device."
                ) from error
        self._checked = True

    def _require_weights(self, base: str, lm: FrozenLM) -> None:
        """Refuses methods that train weights where there are only codes; PEFT has adapters beside bitsandbytes'."""
        found = {key.method for key in self.todo() if key.base == base and METHODS[key.method].kind == "weights"}
        found -= {"lora"} if lm.quantized == "nf4" else set()
        if lm.quantized and found:
            raise ConfigError(
                f"{' and '.join(sorted(found))} would train the weights of {base}, of which there are {lm.quantized} "
                "codes alone; leave --quantize out, or name other --methods."
            )

    def _time(self, base: str, lm: FrozenLM, load: float) -> None:
        self._notice(f"timing {base} on some test rows")
        try:
            self._speeds[base] = Speed.of(self.plan, lm, load, self._plain_seconds)
        except (SoftPromptError, RuntimeError, MemoryError) as error:
            if isinstance(error, RuntimeError) and not _may_happen(error):
                raise

    def _base(self, base: str) -> tuple[FrozenLM, float]:
        """A base model and its perplexity on plain text; one is held at a time."""
        if self._loaded is None or self._loaded[0] != base:
            self._loaded = None
            gc.collect()
            lm = self._load(base)
            _ = lm.digest_before  # now, and not in the time of a method
            began = time.perf_counter()
            self._loaded = (base, lm, plain_perplexity(lm))
            self._plain_seconds = time.perf_counter() - began
        return self._loaded[1:]

    def _measured(self, key: Key, lm: FrozenLM, before: float) -> dict[str, Any]:
        plan, method = self.plan, METHODS[key.method]
        problem = Problem(
            lm=lm,
            fresh=lambda: self._load(key.base),
            template=plan.form,
            verbalizer=plan.verbalizer,
            train=plan.train,
            validation=plan.validation,
            seed=key.seed,
            budget=plan.budget,
            instructions=plan.instructions,
            notice=self._notice,
            siblings=tuple(self._soft_prompts(key.base)) if method.of_several_seeds else (),
        )
        if method.validated:
            rows = self._validation_rows(problem, key.base)
            problem = replace(problem, validation_rows=rows, began=time.perf_counter())
        with peak_memory(lm) as peak:
            began = time.perf_counter()
            learned = method.run(problem)
            seconds = time.perf_counter() - began
            self._notice("answering the test rows")
            predictions = learned.answer(plan.test.examples, self._rows_done)
            answering = time.perf_counter() - began - seconds
        metric = headline(plan.metric, plan.test, predictions)
        answered = most_frequent_answer(plan.test, predictions)
        _write_json(self.folder / "predictions" / f"{key.file_name}.json", [_plain(one) for one in predictions])
        if learned.soft_prompt is not None:
            named = replace(learned.soft_prompt, name=key.file_name)
            named.save(self.folder / "soft-prompts" / f"{key.file_name}{artifact.SUFFIX}")
        if method.of_several_seeds:  # what its members took
            seconds += sum(cell["train_seconds"] for cell in self.cells if _is_member(cell, key))
        self._notice("measuring latency and forgetting")
        after = before if learned.adapted is None else plain_perplexity(learned.adapted)
        return {
            "status": "done",
            "reason": None,
            **metric.as_dict(),
            "metrics": [one.as_dict() for one in (metric, *self._beside(predictions))],
            "most_frequent_answer": answered and answered.as_dict(),
            "base_parameters": lm.num_parameters,
            "trainable_parameters": learned.trainable_parameters,
            "bytes": learned.bytes,
            "train_seconds": round(seconds, 1),
            "answer_seconds": round(answering, 1),
            "peak_memory_bytes": peak[0] + (lm_bytes(lm) if learned.adapted is None else 0),
            "latency_ms": round(self._latency(learned), 2),
            "forgetting": {"before": before, "after": after, "ratio": after / before},
            "validation": learned.validation,
            "validation_rows": learned.validation_rows,
            "chosen": self._with_text(learned.chosen),
            "alarms": [{"kind": alarm.kind, "sentence": alarm.found} for alarm in learned.alarms],
            "curve": [dict(point) for point in learned.curve],
            "threads": torch.get_num_threads(),
            "dtype": str(lm.dtype).removeprefix("torch."),
        }

    def _validation_rows(self, problem: Problem, base: str) -> int:
        """The same for every method that is trained on a base model: as the cells have it, or timed once."""
        if base not in self._rows_of_base:
            known = [cell.get("validation_rows") for cell in self.cells if cell["base"] == base]
            self._rows_of_base[base] = max(filter(None, known), default=0) or affordable_rows(problem)
        return self._rows_of_base[base]

    def _beside(self, predictions: Sequence[Prediction]) -> tuple[Metric, ...]:
        """Further metrics of the answers to the test rows; none for free text."""
        verbalizer = self.plan.verbalizer
        if verbalizer is None:
            return ()
        return label_metrics(verbalizer.labels, self.plan.test, predictions, BESIDE_ACCURACY)

    def _with_text(self, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """What was chosen, and beside the number of an instruction its text."""
        index = chosen.get("instruction")
        return {**chosen, **({} if index is None else {"instruction_text": self.plan.instructions[index]})}

    def _rows_done(self, done: int, total: int) -> None:
        self._notice(f"answering the test rows, {done:,} of {total:,}")

    def _latency(self, learned: Learned) -> float:
        """Median milliseconds of a request on its own."""
        rows = self.plan.timed_alone
        times = []
        for example in rows:
            began = time.perf_counter()
            learned.answer([example], None)
            times.append(1000 * (time.perf_counter() - began))
        return statistics.median(times[1:] or times)  # the first one warms up

    def _soft_prompts(self, base: str) -> Iterator[SoftPrompt]:
        for seed in range(self.plan.seeds):
            path = self._file("soft-prompts", Key(base, OURS, seed), artifact.SUFFIX)
            if path is not None:
                yield SoftPrompt.load(path)

    def _compare_with_ours(self) -> None:
        """Gives every cell its difference to the soft prompt of the same base and seed, or else of seed 0."""
        ours = {(cell["base"], cell["seed"]): cell for cell in self.cells if cell["method"] == OURS}
        for cell in self.cells:
            peer = ours.get((cell["base"], cell["seed"])) or ours.get((cell["base"], 0))
            cell["difference"] = None
            if peer is None or cell is peer or cell["status"] != "done" or peer["status"] != "done":
                continue
            cell["difference"] = self._difference(_key(cell), _key(peer))

    def _difference(self, one: Key, other: Key) -> dict[str, float] | None:
        """What ``one`` scores above ``other`` on the test rows, with its paired bootstrap interval."""
        answers = [self._answers(key) for key in (one, other)]
        if None in answers:
            return None
        first, second = ([str(a) for a in several or ()] for several in answers)
        value, low, high = headline_difference(self.plan.metric, self.plan.test, first, second)
        return {"value": value, "low": low, "high": high}

    def _answers(self, key: Key) -> list[str] | None:
        path = self._file("predictions", key, ".json")
        return None if path is None else [row["text"] for row in json.loads(path.read_text("utf-8"))]

    def _file(self, folder: str, key: Key, suffix: str) -> Path | None:
        """A cell's own file, also one that an earlier release wrote, if it can be no other base model's."""
        parent = self.folder / folder
        own, earlier = (parent / f"{name}{suffix}" for name in (key.file_name, key.earlier_file_name))
        if own != earlier and own.exists():
            return own
        others = (_key(cell) for cell in self.cells if cell["status"] == "done" and _key(cell) != key)
        rivals = [other for other in others if other.earlier_file_name == key.earlier_file_name]
        theirs = [parent / f"{other.file_name}{suffix}" for other in rivals]
        unclear = any(path == earlier or not path.exists() for path in theirs)
        return earlier if earlier.exists() and not unclear else None


# --- files ----------------------------------------------------------------------------------------


_EXPECTED = re.compile(
    r"out of memory|(can't|cannot) allocate memory|not enough memory|ALLOC_FAILED|\binf\b.*\bnan\b", re.I
)


def _may_happen(error: RuntimeError) -> bool:
    """Whether an error of torch's says that memory was too small, or that numbers were not finite."""
    return type(error).__name__ == "LinAlgError" or _EXPECTED.search(str(error)) is not None


def _key(cell: Mapping[str, Any]) -> Key:
    return Key(cell["base"], cell["method"], cell["seed"])


def _is_member(cell: Mapping[str, Any], key: Key) -> bool:
    return (cell["base"], cell["method"], cell["status"]) == (key.base, OURS, "done")


def _plain(prediction: Prediction) -> dict[str, Any]:
    return {"text": prediction.text, "logprobs": prediction.logprobs and dict(prediction.logprobs)}


def _write_json(path: Path, document: object) -> None:
    with atomic_writer(path) as file:
        text = json.dumps(finite(document), ensure_ascii=False, allow_nan=False, indent=1)
        file.write(text.encode() + b"\n")


def _read_cells(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        cells = json.loads(path.read_text("utf-8"))
        if not (isinstance(cells, list) and all(isinstance(cell["identity"], dict) for cell in cells)):
            raise ValueError
        for cell in cells:
            _key(cell), cell["status"], cell["task"]
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"Expected a comparison's results in {path}, found something else; choose another --out."
        ) from error
    return cells
