"""The ten lines: load a model, train, evaluate, predict, serve.

Each function is a short way through the rooms below; whoever wants to see each step uses :class:`Training`,
:class:`Task` and ``softprompt.tasks.predict`` themselves.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from softprompt.data.checks import Reading, as_format
from softprompt.data.columns import Columns
from softprompt.data.example import Dataset, Example
from softprompt.data.packages import DEFAULT_BASE
from softprompt.data.sources import Source
from softprompt.errors import ConfigError, SoftPromptWarning, missing_library
from softprompt.evaluation import evaluate as evaluation
from softprompt.evaluation.ensemble import evaluate_ensemble
from softprompt.evaluation.evaluate import Evaluation
from softprompt.files import StrPath, local_path
from softprompt.model.distributed import ALONE, World
from softprompt.model.frozen import FrozenLM
from softprompt.model.loading import lasting
from softprompt.model.request import Sampling
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.soft_prompts.store import is_name
from softprompt.tasks import predict as answering
from softprompt.tasks.ensemble import Ensemble
from softprompt.tasks.inputs import Input, example_of, examples_of
from softprompt.tasks.predict import Predictions, Progress, Query
from softprompt.tasks.reading import Labels, read_for
from softprompt.tasks.task import Task
from softprompt.terminal.console import rows_bar, say_reading, stderr, were_cut
from softprompt.terminal.many import watch_together
from softprompt.terminal.training import watch
from softprompt.text.chat import with_answers
from softprompt.text.template import Template
from softprompt.tuning.config import TrainConfig
from softprompt.tuning.job import Job, of_job, with_settings
from softprompt.tuning.many import train_together
from softprompt.tuning.step import Alarm
from softprompt.tuning.tracking import Track, tracking
from softprompt.tuning.training import Training

if TYPE_CHECKING:
    from softprompt.serving.jobs import Limits
    from softprompt.serving.listening import RunningServer


def load_model(
    base: StrPath | Any = DEFAULT_BASE,
    tokenizer: Any = None,
    *,
    name: str | None = None,
    copy: bool = False,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    quantize: str | None = None,
    world: World = ALONE,
) -> FrozenLM:
    """A frozen base model, which all that follows shares.

    Args:
        base: ``smollm2-135m``, a hub id, a folder with safetensors, a GGUF file, or a causal language model of
            transformers that is loaded already. Such a model is frozen in place: it is set to evaluation mode, none of
            its weights requires a gradient any more, its attention is computed by softprompt, with the same results,
            and ``dtype``, ``device`` and ``quantize`` are applied if given. Its weights are not changed otherwise.
        tokenizer: with a model that is loaded already, its tokenizer.
        name: what soft prompts remember as their base model, to find it again; by default ``base``, or where the model
            was loaded from.
        copy: freeze a copy of a loaded model, which takes its memory a second time, and leave it as it is.
        dtype: ``fp32``, ``bf16``, ``fp16``, or ``auto``: that of a loaded model; else bf16 where the processor computes
            it natively, and fp32 elsewhere.
        device: ``auto``, ``cpu``, ``cuda``, ``mps`` …; ``auto`` is that of a loaded model, else the best there is.
        trust_remote_code: run code that comes with the model.
        quantize: ``nf4``, ``int8``, ``int4`` or ``fp8``: what its linear layers are stored in from now on; None: as
            they are, also where the model is quantised already.
        world: ``World.join()`` in a script that ``torchrun`` starts: the processes that share the work; not for a model
            that is loaded already.

    Raises:
        BaseModelError: the model cannot be found or read, or is no causal language model.
        ConfigError: an unknown dtype, device or precision, one that this machine cannot compute with, or a loaded model
            without its tokenizer.
    """
    if isinstance(base, str | os.PathLike):
        if tokenizer is not None or copy:
            raise ConfigError("tokenizer and copy are for a model that is loaded already; leave them out, or give one.")
        lm = FrozenLM.load(
            lasting(base),
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            quantize=quantize,
            world=world,
        )
        lm.name = name or lm.name
        return lm
    if tokenizer is None or not hasattr(base, "get_input_embeddings"):
        found = f"a {type(base).__name__}" + " without a tokenizer" * (tokenizer is None)
        raise ConfigError(
            f"Expected a model's id, folder or .gguf file, or a loaded transformers model and its tokenizer, "
            f"found {found}; write load_model(model, tokenizer)."
        )
    return FrozenLM.wrap(base, tokenizer, name=name, copy=copy, dtype=dtype, device=device, quantize=quantize)


def train(
    lm: FrozenLM,
    data: Source | Dataset,
    *,
    validation: Source | Dataset | None = None,
    name: str = "soft-prompt",
    template: str | Template = "default",
    labels: Labels | None = None,
    input_field: str | None = None,
    target_field: str = "target",
    references_field: str | None = None,
    encoding: str | None = None,
    format: str | None = None,
    start: SoftPrompt | None = None,
    config: TrainConfig | None = None,
    folder: StrPath | None = None,
    resume: bool = False,
    track: str | None = None,
    progress: bool = True,
    **settings: Any,
) -> SoftPrompt:
    """Tunes a soft prompt on labelled or free-text examples.

    Args:
        lm: the frozen base model.
        data: a path, ``hf:DATASET[/CONFIG][:SPLIT]``, a list of dicts, a pandas, polars, Arrow or ``datasets`` table,
            or a data set that was read already.
        validation: rows to choose the best step by; None: a tenth of ``data``.
        name: what the soft prompt is called.
        template: ``"default"``, ``"chat"`` (the base model's own chat template), or text with ``{soft_prompt}``, fields
            and ``{target}``.
        labels: the label set as text or a list, or label → its word or words; ``"all"``: each target is a label;
            ``"none"``: free text; None: as the targets look.
        input_field, target_field, references_field, encoding: columns of other names than ``input`` and ``target``, and
            one of further accepted answers to free text; the encoding of files of text, UTF-8 if None.
        format: what the columns are: ``"none"`` (a column for each field, and the targets), ``"completion"``,
            ``"alpaca"``, ``"sharegpt"`` or ``"messages"``; None: told from them, where those of ``"none"`` are not
            there and neither columns nor a template are named.
        start: a soft prompt of the same base model to start from.
        config: settings; None: the defaults.
        folder: where checkpoints, log and history are kept; None keeps none.
        resume: go on from the checkpoint in ``folder``, if there is one.
        track: hand each step to ``tensorboard`` (event files in ``folder``, or in ``runs``), ``wandb`` or ``mlflow``.
        progress: show on stderr what the data were taken for, the plan, and a progress bar, in a notebook too.
        settings: fields of :class:`TrainConfig` by name, which count for more than ``config``: ``steps=600``.

    Returns:
        The best soft prompt by validation. Where the loss stopped being finite, the last good one, with a warning.

    Raises:
        DataError, TemplateError: data or a template that cannot be meant, or do not fit the base model.
        ConfigError, BaseModelError: settings that contradict each other; ``start`` is of another base model.
        StoreError, TrainingError: ``folder`` cannot be written or is held by another training; nothing was learned.
    """
    require_model(lm)
    job = Job.read(
        data,
        validation,
        name=name,
        template=template,
        labels=labels,
        columns=Columns(input_field, target_field, references_field, encoding, format),
        start=start,
        config=with_settings(config, settings),
    ).on(lm)
    training = job.training(lm, folder=folder, resume=resume)
    writes = lm.world.writes
    with tracking(track if writes else None, training, Path(folder or "runs") / "tensorboard") as report:
        _run(training, job.reading, report, progress and writes)
    return training.result()


def fit_many(
    lm: FrozenLM,
    jobs: Sequence[Mapping[str, Any] | Training],
    *,
    folder: StrPath | None = None,
    resume: bool = False,
    progress: bool = True,
    **defaults: Any,
) -> list[SoftPrompt | None]:
    """Tunes several soft prompts on one base model in shared passes, each as it would be tuned alone.

    One that ends early, or whose loss is not finite, leaves the others as they are.

    Args:
        lm: the frozen base model of all of them.
        jobs: of each soft prompt the arguments of :func:`train` by name: ``data`` and whatever else; or a
            :class:`Training` on this base model, before its first step.
        folder: holds a folder a name with checkpoint, log and history; None keeps none. Names must differ then.
        resume: go on from the checkpoints there.
        progress: show what the data were taken for, and a table of all on stderr.
        defaults: arguments of :func:`train` for every job that does not say its own: ``steps=600``.

    Returns:
        The best soft prompt of each by validation, in order. Where the loss stopped being finite, the last good one,
        with a warning; None, with a warning, where that happened at the very first step.

    Raises:
        ConfigError: there is no job, an argument is unknown, two jobs share a name and ``folder`` is given, or as for
            :func:`train`; the sentence names the job.
        DataError, TemplateError, BaseModelError, StoreError: as for :func:`train`.
    """
    require_model(lm)
    if not jobs:
        raise ConfigError("Expected at least one job to train, found none; give a list of dicts, each with its data.")
    trainings: list[Training] = []
    for number, given in enumerate(jobs, start=1):
        if isinstance(given, Training):
            trainings.append(given)
            continue
        job = Job.of({**defaults, **given}, number)
        if folder is not None and not is_name(job.name):
            raise ConfigError(
                f"job {job.name!r}: with a folder, a name is letters, digits, '-', '_' and '.'; choose another."
            )
        own = None if folder is None else Path(folder) / job.name
        if own is not None and any(each.folder == local_path(own) for each in trainings):
            raise ConfigError(f"Two jobs are called {job.name!r}; give each a name of its own.")
        with of_job(job.name):
            job = job.on(lm)
            trainings.append(job.training(lm, folder=own, resume=resume))
        if progress:
            say_reading(job.reading, job.name)
        else:
            for doubt in job.reading.doubts:
                warnings.warn(f"{job.name}: {doubt}", SoftPromptWarning, stacklevel=2)
    if progress:
        watch_together(trainings)
    else:
        for _ in train_together(trainings):
            pass
    return [_result(training) for training in trainings]


def evaluate(
    lm: FrozenLM,
    soft_prompt: SoftPrompt | Sequence[SoftPrompt],
    data: Source | Dataset,
    *,
    vote: str | None = None,
    base_only: bool = False,
    metrics: Sequence[str] | None = None,
    input_field: str | None = None,
    target_field: str = "target",
    references_field: str | None = None,
    encoding: str | None = None,
    format: str | None = None,
    sampling: Sampling | None = None,
    normalise: bool = False,
    progress: bool = True,
) -> Evaluation:
    """Measures a soft prompt on rows with targets, or several that answer together.

    Args:
        lm: the base model that it was tuned on.
        soft_prompt: what to measure; a list of several of one task: their joint answers, and each of them.
        data: as for :func:`train`.
        vote: how several vote, ``mean`` (of the labels' probabilities) or ``majority``; None: the mean, for free text
            the majority.
        base_only: leave the soft prompt out and keep its template: what the base model does alone.
        metrics: names, the first is the headline; of labels ``accuracy``, ``macro_f1``, ``mcc``, ``log_loss``,
            ``calibration_error``, of free text ``bleu``, ``rouge_l``, ``exact_match``, ``token_f1``, ``perplexity``;
            None: all of them.
        input_field, target_field, references_field, encoding, format: as for :func:`train`.
        sampling: how free text is generated; None: greedily.
        normalise: divide the log-probability of a label's word by its number of tokens.
        progress: show a progress bar on stderr.

    Returns:
        Its metrics, each with standard error and 95 % interval, and the answers; of several a ``JointEvaluation``.

    Raises:
        DataError: data that cannot be read, or a target that is not one of the labels.
        ConfigError: a metric that this kind of task does not have, or soft prompts that cannot answer together.
        BaseModelError: the soft prompt is of another base model.
    """
    require_model(lm)
    together = _together(lm, soft_prompt, vote)
    if together is not None and base_only:
        raise ConfigError("base_only leaves the soft prompt out, of which there are several; give one of them.")
    soft_prompt = soft_prompt if isinstance(soft_prompt, SoftPrompt) else soft_prompt[0]
    task = Task.of(lm, soft_prompt)
    rows = data
    if not isinstance(rows, Dataset):
        columns = Columns(input_field, target_field, references_field, encoding, format)
        rows = read_for(soft_prompt, rows, columns)
        if progress and rows.recognised:
            stderr.print(f"{rows.source}: {as_format(rows.format, rows.recognised)}")
    rows = with_answers(rows, lm.tokenizer)
    vectors = None if base_only else soft_prompt.vectors
    task = task.without_soft_prompt() if base_only else task
    with _bar("evaluating", progress) as report:
        if together is not None:
            found: Evaluation = evaluate_ensemble(
                together, rows, metrics=metrics, normalise=normalise, sampling=sampling, progress=report
            )
        else:
            found = evaluation.evaluate(
                task, vectors, rows, metrics=metrics, normalise=normalise, sampling=sampling, progress=report
            )
    _warn_truncated(found.truncated, task.max_length)
    if found.most_frequent is not None and found.most_frequent.is_telling:
        name = soft_prompt.name if together is None else ", ".join(together.names)
        what = f"{lm.name} without a soft prompt" if base_only else name
        warnings.warn(f"{what} {found.most_frequent}", SoftPromptWarning, stacklevel=2)
    return found


def predict(
    lm: FrozenLM,
    soft_prompt: SoftPrompt | Sequence[SoftPrompt] | Iterable[tuple[SoftPrompt, Input]],
    inputs: Input | Iterable[Input] | Path | None = None,
    *,
    vote: str | None = None,
    sampling: Sampling | None = None,
    normalise: bool = False,
    progress: bool = False,
) -> Predictions:
    """Answers input texts: a label with probabilities, or generated text.

    ``predict(lm, soft_prompt, inputs)`` answers with one soft prompt, ``predict(lm, [a, b, c], inputs)`` with several
    together, ``predict(lm, pairs)`` each input with its own: all in shared batches of the one base model.

    Args:
        lm: the base model of all soft prompts.
        soft_prompt: a soft prompt, a list of several of one task, or pairs of a soft prompt and an input.
        inputs: texts, or for a template with several fields dicts of them by name; a single one is a list of one. A
            ``pathlib.Path`` is a data file.
        vote: as for :func:`evaluate`.
        sampling: how free text is generated; None: greedily.
        normalise: divide the log-probability of a label's word by its number of tokens.
        progress: show a progress bar on stderr.

    Returns:
        One prediction an input, in order; of several soft prompts together a ``JointPrediction``.

    Raises:
        DataError: an input without the template's fields, or blank, or a file that cannot be read.
        BaseModelError: a soft prompt of another base model.
        ConfigError: the numbers of the base model overflow in its dtype, or soft prompts cannot answer together.
    """
    require_model(lm)
    if inputs is not None and (together := _together(lm, soft_prompt, vote)) is not None:
        examples = examples_of(together.soft_prompts[0], inputs)
        with _bar("predicting", progress) as report:
            joint = together.predict(examples, sampling=sampling, normalise=normalise, progress=report)
        _warn_truncated(sum(one.truncated for one in joint), together.tasks[0].max_length)
        return Predictions(joint)
    if vote is not None:
        raise ConfigError("A vote is for several soft prompts together, predict(lm, [a, b, c], inputs); leave it out.")
    if isinstance(soft_prompt, SoftPrompt):
        if inputs is None:
            raise ConfigError("predict(lm, soft_prompt, inputs) needs inputs; give a list of texts.")
        pairs: list[tuple[SoftPrompt, Input | Example]] = [
            (soft_prompt, one) for one in examples_of(soft_prompt, inputs)
        ]
    elif inputs is None:
        pairs = list(_pairs(soft_prompt))
    else:
        raise ConfigError(
            f"Expected a soft prompt before the inputs, found a {type(soft_prompt).__name__}; load it with "
            f"SoftPrompt.load(path), or give pairs of a soft prompt and an input."
        )
    tasks: dict[int, Task] = {}
    queries = []
    for number, (one, given) in enumerate(pairs, start=1):
        if id(one) not in tasks:
            tasks[id(one)] = Task.of(lm, one)
        task = tasks[id(one)]
        example = given if isinstance(given, Example) else example_of(task.template, given, number)
        queries.append(Query(task, example, one.vectors))
    with _bar("predicting", progress) as report:
        found = answering.predict(queries, sampling=sampling, normalise=normalise, progress=report)
    cut = sum(prediction.truncated for prediction in found)
    _warn_truncated(cut, max((task.max_length for task in tasks.values()), default=0))
    return Predictions(found)


def serve(
    lm: FrozenLM,
    soft_prompts: Mapping[str, SoftPrompt | StrPath],
    *,
    ensembles: Mapping[str, Sequence[str]] | None = None,
    vote: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    limits: Limits | None = None,
    block: bool = True,
) -> RunningServer:
    """Serves the base model and soft prompts on it over OpenAI's API; a request's ``model`` names the soft prompt.

    Args:
        lm: the base model; while it is served, leave it to the server.
        soft_prompts: name in requests → soft prompt, or its file.
        ensembles: name in requests → the names of soft prompts with labels that answer together.
        vote: as for :func:`evaluate`.
        host: the address to listen on.
        port: 0: any that is free.
        api_key: what clients must send as Bearer token; None: anyone may ask.
        limits: of rows, tokens, waiting requests and seconds; None: the defaults.
        block: answer until Ctrl-C. False returns at once, and the server answers in a thread until ``close()``.

    Returns:
        The server, closed already if it was waited for.

    Raises:
        ConfigError: the address is taken, or the libraries for serving are not installed.
        ArtifactError: a file is not a sound soft prompt.
        BaseModelError: a soft prompt is of another base model.
    """
    require_model(lm)
    try:
        from softprompt.serving import listening, server
        from softprompt.serving.catalog import Catalog
        from softprompt.serving.engine import Engine
        from softprompt.serving.jobs import Limits
    except ImportError as error:
        raise missing_library("Serving", error.name, "softprompt[serve]") from error
    from softprompt.soft_prompts.store import Store

    limits = limits or Limits()
    listener = listening.bound(host, port)
    files = TemporaryDirectory(prefix="softprompt-")
    try:
        catalog = Catalog(lm, Store(files.name), limits.window(lm))
        for name, one in soft_prompts.items():
            stored = catalog.store.save(replace(one, name=name)) if isinstance(one, SoftPrompt) else local_path(one)
            catalog.load(name, stored)
        for name, members in (ensembles or {}).items():
            catalog.join(name, members, vote)
        app = server.create_app(Engine(lm, limits), catalog, api_key=api_key)
        running = listening.RunningServer(app, listener, host, limits.seconds, files)
    except BaseException:
        listener.close()
        files.cleanup()
        raise
    if block:
        stderr.print(f"listening on {running.url}; Ctrl-C ends it")
        running.wait()
    return running


def require_model(lm: object) -> None:
    if not isinstance(lm, FrozenLM):
        raise ConfigError(
            f"Expected a base model first, as load_model gives it, found a {type(lm).__name__}; functions that take "
            f"queries and tasks are in softprompt.tasks.predict and softprompt.evaluation.evaluate."
        )


def _result(training: Training) -> SoftPrompt | None:
    """What came of one of several; None if nothing was learned."""
    if training.stopped == "not finite":
        warnings.warn(f"{training.name}: {_not_finite(training)}", SoftPromptWarning, stacklevel=3)
        if not training.tokens:
            return None
    found = training.result()
    for alarm in training.alarms:
        warnings.warn(f"{training.name}: {alarm.sentence}", SoftPromptWarning, stacklevel=3)
    return found


def _run(training: Training, reading: Reading, track: Track, progress: bool) -> None:
    """Trains to the end, and warns of what the user should know."""
    before = training.watch.before
    _warn_of(before)
    if progress:
        say_reading(reading)
        watch(training, track=track)
    else:
        for doubt in reading.doubts:
            warnings.warn(doubt, SoftPromptWarning, stacklevel=3)
        for step in training:
            track(step)
            _warn_of(step.alarms)
    _warn_of(training.alarms[len(before) :])
    _warn_truncated(training.truncated, training.task.max_length)
    if training.stopped == "not finite":
        warnings.warn(_not_finite(training), SoftPromptWarning, stacklevel=3)


def _not_finite(training: Training) -> str:
    if not training.tokens:
        return "the loss is not finite at the very first step, so nothing was learned; try dtype fp32"
    return (
        f"the loss is not finite any more after step {training.step:,} of {training.total:,}; the soft prompt is "
        f"the last good one; train again with an lr below {training.config.lr}, or with dtype fp32"
    )


def _warn_of(alarms: Sequence[Alarm]) -> None:
    for alarm in alarms:
        warnings.warn(alarm.sentence, SoftPromptWarning, stacklevel=4)


def _together(lm: FrozenLM, soft_prompt: object, vote: str | None) -> Ensemble | None:
    """Several soft prompts as an ensemble; None for anything else.

    Raises:
        ConfigError: they cannot answer together, or one is to vote.
    """
    if isinstance(soft_prompt, list | tuple) and all(isinstance(one, SoftPrompt) for one in soft_prompt):
        return Ensemble.of(lm, soft_prompt, vote)
    if vote is not None and isinstance(soft_prompt, SoftPrompt):
        raise ConfigError("A vote is for several soft prompts; give a list of them, or leave it out.")
    return None


def _pairs(given: Sequence[SoftPrompt] | Iterable[tuple[SoftPrompt, Input]]) -> Iterator[tuple[SoftPrompt, Input]]:
    for one in given:
        if isinstance(one, SoftPrompt):
            raise ConfigError("predict(lm, [a, b, c], inputs) needs inputs; give a list of texts.")
        yield one


def _bar(what: str, progress: bool) -> AbstractContextManager[Progress | None]:
    return rows_bar(what) if progress else nullcontext()


def _warn_truncated(truncated: int, max_length: int) -> None:
    if truncated:
        warnings.warn(were_cut(truncated, max_length), SoftPromptWarning, stacklevel=3)
