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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from softprompt.compare.comparison_time import Speed
from softprompt.compare.measure import lm_bytes, peak_memory, plain_perplexity
from softprompt.compare.plan import Key, Plan
from softprompt.compare.together import Group
from softprompt.errors import BaseModelError, ConfigError, ProcessError, SoftPromptError, TrainingError
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
from softprompt.model.distributed import ALONE, World
from softprompt.model.frozen import FrozenLM
from softprompt.soft_prompts import artifact
from softprompt.soft_prompts.metadata import library_versions
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.tasks.predict import Prediction

BESIDE_ACCURACY = ("macro_f1", "mcc")
"""What labels are measured by besides the headline: accuracy hides that a rare label is never found."""


@dataclass(frozen=True)
class _Waiting:
    """What was learned for a cell, before it is measured.

    Attributes:
        found: what was learned, or why nothing was.
        peak: the most bytes that learning took, of all cells of the group.
        group: which learned together.
    """

    found: Learned | SoftPromptError
    peak: int
    group: Group

    def taken(self) -> Learned:
        if isinstance(self.found, SoftPromptError):
            raise self.found
        return self.found


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
        self._world = World.join()
        self._ran: set[Key] = set()
        self._apart: set[tuple[str, str]] = set()
        self._waiting: dict[Key, _Waiting] = {}
        self._groups: dict[Key, Group] = {}
        self._checked = False
        self._rows_of_base: dict[str, int] = {}
        self._speeds: dict[str, Speed] = {}
        self._plain_seconds = 0.0
        self.cells: list[dict[str, Any]] = self._world.from_first(lambda: _read_cells(self.folder / "results.json"))
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

    @property
    def learned(self) -> frozenset[Key]:
        """Cells whose method has learned, together with that of an earlier cell, and that are not measured yet."""
        return frozenset(self._waiting)

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
        a cell with status ``failed`` and its reason; the next try runs it again. ``seconds`` is all that it took. The
        first cell of a method that learns for several seeds in shared passes does so for all that are left; each cell
        counts its part of that time.

        Raises:
            BaseModelError: before the first cell, a base model of the plan cannot be loaded.
        """
        self._check_bases()
        began, self._together_seconds = time.perf_counter(), 0.0
        self._ran.add(key)
        torch.compiler.reset()  # it keeps few graphs of a function; beyond, layers would run uncompiled without a word
        try:
            lm, before = self._base(key.base)
            problem = self._problem(key, lm)
            if METHODS[key.method].alone:
                cell = self._world.alone(lambda: self._measured_alone(key, problem, before))
            else:
                cell = self._measured(key, problem, before)
        except ProcessError:
            raise
        except (SoftPromptError, FloatingPointError, RuntimeError, MemoryError) as error:
            if isinstance(error, RuntimeError) and not _may_happen(error):
                raise  # a mistake of ours, which must not look like a method that does not work
            if self._world.size > 1 and not isinstance(error, SoftPromptError):
                raise self._of_this_process(error) from error
            cell = {"status": "failed", "reason": _reason(error), "value": None}
        self.cells = self._world.from_first(lambda: self._with(key, cell, began))
        if key in self._groups and self._world.writes:
            self._groups[key].done(key)
        self._groups.pop(key, None)
        return next(one for one in self.cells if _key(one) == key)

    def _with(self, key: Key, cell: dict[str, Any], began: float) -> list[dict[str, Any]]:
        """All cells with a new one, which are written down."""
        cell = {"task": self.plan.task, "method": key.method, "base": key.base, "seed": key.seed, **cell}
        cell |= {"budget_seconds": self.plan.budget, "identity": self.plan.identity(key.method)}
        cell["versions"] = library_versions()
        self.cells = [other for other in self.cells if _key(other) != key] + [cell]
        order = {method: place for place, method in enumerate(METHODS)}
        self.cells.sort(key=lambda one: (one["base"], order[one["method"]], one["seed"]))
        self._compare_with_ours()
        part = cell["train_seconds"] if cell.get("learned_with") is not None else 0.0
        cell["seconds"] = round(time.perf_counter() - began - self._together_seconds + part, 1)
        _write_json(self.folder / "results.json", self.cells)
        return self.cells

    def _of_this_process(self, error: BaseException) -> TrainingError:
        """What happened to one of several processes, and perhaps not to the others, so that they cannot go on."""
        return TrainingError(
            f"Process {self._world.rank} of {self._world.size} cannot go on ({_reason(error)}); the cells that are "
            f"done stay: give the same command with fewer processes on a machine, or leave the method out."
        )

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
                f"{' and '.join(sorted(found))} would train the weights of {base}, which are stored as {lm.quantized} "
                "codes only; leave --quantize out, or name other --methods."
            )

    def _time(self, base: str, lm: FrozenLM, load: float) -> None:
        self._notice(f"timing {base} on some test rows")
        try:
            self._speeds[base] = Speed.of(self.plan, lm, load, self._plain_seconds)
        except ProcessError:
            raise
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

    def _problem(self, key: Key, lm: FrozenLM) -> Problem:
        """What a cell's method is to learn; its budget begins to run when it is returned."""
        plan, method = self.plan, METHODS[key.method]
        problem = Problem(
            lm=lm,
            fresh=lambda: _for_one(self._load(key.base)),
            template=plan.form,
            verbalizer=plan.verbalizer,
            train=plan.train,
            validation=plan.validation,
            seed=key.seed,
            starts=plan.starts,
            budget=plan.budget,
            instructions=plan.instructions,
            notice=self._notice,
            siblings=self._soft_prompts(key.base) if method.of_several_seeds else (),
        )
        if method.validated:
            rows = self._validation_rows(problem, key.base)
            problem = replace(problem, validation_rows=rows, began=time.perf_counter())
        return problem

    def _measured_alone(self, key: Key, problem: Problem, before: float) -> dict[str, Any]:
        """A cell of one process, whatever the others do."""
        world, problem.lm.world = problem.lm.world, ALONE
        try:
            return self._measured(key, problem, before)
        except (FloatingPointError, RuntimeError, MemoryError) as error:
            if isinstance(error, RuntimeError) and not _may_happen(error):
                raise
            raise TrainingError(_reason(error)) from error
        finally:
            problem.lm.world = world

    def _measured(self, key: Key, problem: Problem, before: float) -> dict[str, Any]:
        plan, method, lm = self.plan, METHODS[key.method], problem.lm
        waiting = self._learn_together(key, problem) if method.together is not None else None
        with peak_memory(lm) as peak:
            began = time.perf_counter()
            learned = method.run(problem) if waiting is None else waiting.taken()
            seconds = time.perf_counter() - began if learned.seconds is None else learned.seconds
            began = time.perf_counter()
            self._notice("answering the test rows")
            predictions = learned.answer(plan.test.examples, self._rows_done)
            answering = time.perf_counter() - began
        metric = headline(plan.metric, plan.test, predictions)
        answered = most_frequent_answer(plan.test, predictions)
        if self._world.writes:
            _write_json(self.folder / "predictions" / f"{key.file_name}.json", [_plain(one) for one in predictions])
        if learned.soft_prompt is not None and self._world.writes:
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
            **({} if waiting is None else {"learned_with": [seed for seed in waiting.group.seeds if seed != key.seed]}),
            "peak_memory_bytes": max(peak[0], waiting.peak if waiting else 0)
            + (lm_bytes(lm) if learned.adapted is None else 0),
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

    def _learn_together(self, key: Key, problem: Problem) -> _Waiting:
        """What a cell's method has learned, in shared passes with that of the other cells of the method."""
        if key not in self._waiting:
            began = time.perf_counter()
            try:
                self._learn_group(key, problem)
            except (SoftPromptError, RuntimeError, MemoryError) as error:
                one = len(self._groups[key].keys) == 1 or isinstance(error, ProcessError) or self._world.size > 1
                if one or (isinstance(error, RuntimeError) and not _may_happen(error)):
                    raise
                self._notice("one by one, since shared passes did not work here")
                self._apart.add((key.base, key.method))
                self._groups[key].drop()
                self._learn_group(key, replace(problem, began=time.perf_counter()))
            finally:
                self._together_seconds = time.perf_counter() - began
        return self._waiting.pop(key)

    def _learn_group(self, key: Key, problem: Problem) -> None:
        together = METHODS[key.method].together
        assert together is not None
        left = [one for one in self.todo() if one == key or one not in self._ran]
        left = [key] if (key.base, key.method) in self._apart else left
        group = self._world.from_first(lambda: Group.of(self.folder, key, left))
        self._groups |= dict.fromkeys(group.keys, group)
        with peak_memory(problem.lm) as peak:
            found = together([replace(problem, seed=one.seed) for one in group.keys], group.path)
        for one, own in zip(group.keys, found, strict=True):
            self._waiting[one] = _Waiting(own, peak[0], group)

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

    def _soft_prompts(self, base: str) -> tuple[SoftPrompt, ...]:
        keys = [Key(base, OURS, seed) for seed in range(self.plan.seeds)]

        def load() -> tuple[SoftPrompt, ...]:
            paths = [self._file("soft-prompts", key, artifact.SUFFIX) for key in keys]
            return tuple(SoftPrompt.load(path) for path in paths if path is not None)

        return self._world.from_first(load)

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


def _reason(error: BaseException) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:300]


def _for_one(lm: FrozenLM) -> FrozenLM:
    """A base model whose work is not divided."""
    lm.world = ALONE
    return lm


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
