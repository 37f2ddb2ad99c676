"""Experiment trackers: what each step and validation gave, in TensorBoard, Weights & Biases or MLflow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from softprompt.errors import ConfigError
from softprompt.files import StrPath, local_path
from softprompt.tuning.config import TRACKERS
from softprompt.tuning.step import Step
from softprompt.tuning.training import Training

Track = Callable[[Step], None]
"""Takes each step, in order."""

Write = Callable[[Mapping[str, float], int], None]
"""Takes values by name, and the number of their step."""


@contextmanager
def tracking(kind: str | None, training: Training, folder: StrPath) -> Iterator[Track]:
    """A function that hands each step on to a tracker, until the block ends.

    Names are ``train/loss`` and ``validation/loss`` (nats), ``train/lr`` (RMS of the start), ``train/grad_norm``,
    ``train/tokens_per_second`` and ``validation/<metric>``. The settings go there too.

    Args:
        kind: one of ``TRACKERS``; None: nothing is tracked.
        training: the run, before its first step.
        folder: where TensorBoard's event files go; the other two say themselves, by their environment variables.

    Raises:
        ConfigError: another kind, or its library is not installed.
    """
    if kind is None:
        yield lambda step: None
        return
    if kind not in TRACKERS:
        raise ConfigError(f"The tracker must be one of {', '.join(TRACKERS)}, not {kind!r}.")
    open_tracker = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}[kind]
    settings = {key: value for key, value in training.config.as_dict().items() if value not in (None, [])}
    try:
        write, close = open_tracker(training, str(local_path(folder)), settings)
    except ImportError as error:
        raise ConfigError(
            f"Tracking with {kind} needs the library {error.name or kind}, which is not installed; pip install it."
        ) from error
    try:
        yield lambda step: write(_values(step), step.number)
    finally:
        close()


def _values(step: Step) -> dict[str, float]:
    speed = step.tokens / step.seconds if step.seconds else 0.0
    values = {
        "train/loss": step.loss,
        "train/lr": step.lr,
        "train/grad_norm": step.grad_norm,
        "train/tokens_per_second": speed,
    }
    if step.validation is not None:
        values["validation/loss"] = step.validation["loss"]
        values |= {f"validation/{found['metric']}": found["value"] for found in step.validation["metrics"]}
    return {name: float(value) for name, value in values.items() if value is not None}


def _tensorboard(training: Training, folder: str, settings: Mapping[str, Any]) -> tuple[Write, Callable[[], None]]:
    from torch.utils.tensorboard import SummaryWriter

    # what a resumed run does again is taken out
    writer: Any = SummaryWriter(folder, purge_step=training.step + 1 if training.step else None)
    writer.add_text("settings", "\n".join(f"    {key}: {value}" for key, value in settings.items()))

    def write(values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return write, writer.close


def _wandb(training: Training, folder: str, settings: Mapping[str, Any]) -> tuple[Write, Callable[[], None]]:
    import wandb

    run = wandb.init(name=training.name, config=dict(settings), resume="allow")
    return lambda values, step: run.log(dict(values), step=step), run.finish


def _mlflow(training: Training, folder: str, settings: Mapping[str, Any]) -> tuple[Write, Callable[[], None]]:
    import mlflow

    mlflow.start_run(run_name=training.name)
    mlflow.log_params(dict(settings))
    return lambda values, step: mlflow.log_metrics(dict(values), step=step), mlflow.end_run
