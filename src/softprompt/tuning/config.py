"""Settings of a training, checked once, all at once."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from softprompt.errors import ConfigError

INITS = ("auto", "random", "vocab", "text", "labels")
LOSSES = ("lm", "labels")
OPTIMIZERS = ("adamw", "adafactor")
SCHEDULES = ("linear", "cosine", "constant")
TRACKERS = ("tensorboard", "wandb", "mlflow")
PARAMETRISATIONS = ("plain", "residual", "superpos", "mlp", "prefix")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a soft prompt is tuned. The defaults are meant to need no tuning.

    Attributes:
        num_virtual_tokens: P, how many vectors are learned. None: 64, or with many labels as many as spell them all out
            (``tasks.length.default_num_virtual_tokens``).
        decoder_virtual_tokens: how many more vectors are learned that stand before the decoder's input, of an
            encoder–decoder.
        init: the start. ``text``: embeddings of ``init_text``. ``labels``: embeddings of the labels, the rest as
            ``vocab``. ``vocab``: embeddings of tokens drawn from the most frequent part of the vocabulary. ``random``:
            normal, with the RMS of the embedding table. ``auto``: ``text`` if there is an ``init_text``; with labels,
            the line that names them all if it fits into P tokens, else ``labels``; for free text ``vocab``. On the
            command line also the name or path of a soft prompt.
        init_text: the text for ``text``: cut to P tokens, or repeated so that it ends whole.
        init_scale: factor on all initial vectors but the first, at least 1. None: the factor by which the base model's
            first layer lengthens hidden states (``FrozenLM.first_layer_gain``), so that what is learned reaches the
            deeper layers too. Steps grow with it. With ``prefix`` it is always 1.
        parametrisation: what is trained. ``plain``: the vectors. ``residual``, ``superpos``, ``mlp``: numbers that are
            folded into vectors after training. ``prefix``: keys and values for every layer, or what its layers keep
            in their place, a soft prompt of another kind with a larger file.
        starts: how many runs, with different starts and orders of the data, do the first tenth of the steps. The best
            on the validation rows goes on (successive halving of one round, Jamieson and Talwalkar 2016). With
            ``auto``, further starts take ``labels`` or ``vocab``, which are drawn.
        lengths: other numbers of virtual tokens to try in the same way. The best on the validation rows goes on, so P
            may come out as any of them.
        loss: ``lm``: cross-entropy of all target tokens over the vocabulary. ``labels``: cross-entropy over the labels'
            scores.
        optimizer: ``adamw`` or ``adafactor``.
        lr: peak learning rate, in RMS of each virtual token's initial vector: an Adam step moves an element by at most
            about ``lr`` RMS.
        weight_decay: decoupled, a factor of the learning rate, per step.
        warmup: share of the steps over which the learning rate rises linearly from 0, in [0, 1).
        schedule: how it falls afterwards: ``linear`` or ``cosine`` to 0, or ``constant``.
        clip: the largest norm of the gradient, in loss per RMS of the start. Larger gradients are scaled down. 0: no
            clipping.
        average: decay of an exponential moving average of the soft prompt over the steps, in [0, 1). The average is
            validated and kept (Polyak and Juditsky 1992). At step ``t`` it is ``min(average, (1 + t) / (10 + t))``, so
            that the start is soon forgotten. 0: no average.
        batch_size: examples a step; of conversations, answers.
        steps: optimizer steps. None: ``epochs``, or 1,600 if that is None too.
        epochs: passes over the training data, instead of ``steps``.
        eval_every: steps between validations. None: 100, or more if a validation is slow, as with many labels, so that
            validations take about a quarter of the computation; but at least five validations a run.
        patience: the run ends early after so many validations in a row that are worse than the best by more than
            chance. 0: never.
        validation_rows: the most validation rows that are used, a seeded choice.
        checkpoint_every: steps between checkpoints.
        max_length: the most tokens in one sequence, soft prompt included. None: the model's window.
        seed: seeds the start, the order of the data and the rows held out for validation.
        compile: compile the decoder layers: ``on``, ``off``, or ``auto``, if the run is long enough to gain by it.
        activation_checkpointing: compute activations again in the backward pass instead of keeping them: ``on``,
            ``off``, or ``auto``, if a row alone does not fit into memory otherwise. It changes no number.
    """

    num_virtual_tokens: int | None = None
    decoder_virtual_tokens: int = 0
    init: str = "auto"
    init_text: str | None = None
    init_scale: float | None = None
    parametrisation: str = "plain"
    starts: int = 1
    lengths: tuple[int, ...] = ()
    loss: str = "lm"
    optimizer: str = "adamw"
    lr: float = 0.3
    weight_decay: float = 0.0
    warmup: float = 0.05
    schedule: str = "linear"
    clip: float = 1.0
    average: float = 0.98
    batch_size: int = 16
    steps: int | None = None
    epochs: float | None = None
    eval_every: int | None = None
    patience: int = 3
    validation_rows: int = 500
    checkpoint_every: int = 25
    max_length: int | None = None
    seed: int = 0
    compile: str = "auto"
    activation_checkpointing: str = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", tuple(self.lengths))
        faults = [sentence for ok, sentence in self._checks() if not ok]
        if faults:
            raise ConfigError("; ".join(faults))

    def _checks(self) -> list[tuple[bool, str]]:
        def at_least(name: str, least: float) -> tuple[bool, str]:
            value = getattr(self, name)
            return value is None or value >= least, f"{name} must be at least {least}, not {value}"

        def one_of(name: str, choices: tuple[str, ...]) -> tuple[bool, str]:
            value = getattr(self, name)
            return value in choices, f"{name} must be one of {', '.join(choices)}, not {value!r}"

        return [
            at_least("num_virtual_tokens", 1),
            at_least("decoder_virtual_tokens", 0),
            at_least("starts", 1),
            (
                all(each >= 1 for each in self.lengths),
                f"lengths must be at least 1, not {min(self.lengths, default=1)}",
            ),
            at_least("batch_size", 1),
            at_least("steps", 1),
            at_least("eval_every", 1),
            at_least("patience", 0),
            at_least("validation_rows", 1),
            at_least("checkpoint_every", 1),
            at_least("max_length", 1),
            at_least("weight_decay", 0),
            at_least("clip", 0),
            at_least("seed", 0),
            one_of("parametrisation", PARAMETRISATIONS),
            one_of("loss", LOSSES),
            one_of("optimizer", OPTIMIZERS),
            one_of("schedule", SCHEDULES),
            one_of("compile", ("auto", "on", "off")),
            one_of("activation_checkpointing", ("auto", "on", "off")),
            (
                self.init_scale is None or 1 <= self.init_scale < 1000,
                f"init_scale must be at least 1 and below 1000, not {self.init_scale}",
            ),
            (0 < self.lr < 1000, f"lr must be above 0 and below 1000 RMS of the start, not {self.lr}"),
            (0 <= self.warmup < 1, f"warmup must be a share of the steps in [0, 1), not {self.warmup}"),
            (0 <= self.average < 1, f"average must be in [0, 1), not {self.average}"),
            (self.epochs is None or 0 < self.epochs < 1e6, f"epochs must be above 0 and finite, not {self.epochs}"),
            (self.seed < 2**32, f"seed must be below 2**32, not {self.seed}"),
            (self.steps is None or self.epochs is None, "steps and epochs exclude each other; give one of them"),
            (self.init != "text" or bool(self.init_text), "init text needs an init_text; give one"),
            (
                self.init_text is None or self.init in ("text", "auto"),
                f"an init_text goes with init text, not {self.init}",
            ),
        ]

    @property
    def tries(self) -> int:
        """How many short runs there are in all; 1: the one run is the whole one."""
        return self.starts * (1 + len(self.lengths))

    @property
    def longest(self) -> int:
        """The largest P that is tried, as far as it is known."""
        return max(self.num_virtual_tokens or 0, *self.lengths, 0)

    def start(self, number: int) -> tuple[int, int]:
        """P of the start of that number, and which of the starts of that P it is, from 0; P must be known."""
        assert self.num_virtual_tokens is not None
        draw, place = divmod(number, 1 + len(self.lengths))
        return (self.num_virtual_tokens, *self.lengths)[place], draw

    def as_dict(self) -> dict[str, Any]:
        """JSON values by field name."""
        return {**asdict(self), "lengths": list(self.lengths)}


DEFAULT_STEPS = 1600
EVAL_EVERY = 100

EPOCHS = 20
"""The most passes over the rows where time is given instead of steps. Longer schedules would still be at a high
learning rate when full fine-tuning starts to overfit, so the best checkpoint would come from mid-schedule."""


def most_steps(rows: int, batch_size: int) -> int:
    """The most steps of a soft prompt where time is given instead of steps: ``EPOCHS`` passes over ``rows`` examples,
    or ``DEFAULT_STEPS`` if that is more."""
    return max(DEFAULT_STEPS, math.ceil(EPOCHS * rows / batch_size))


PRESETS: dict[str, dict[str, Any]] = {
    # Lester et al. 2021, §3 and appendix A.1: P=100, Adafactor without parameter scaling, constant rate 0.3 on a
    # table whose
    # RMS is about 10.7, weight decay 1e-5, beta2 decay 0.8, batch 32, 30,000 steps, class-label initialisation.
    "lester2021": {
        "num_virtual_tokens": 100,
        "init_scale": 1.0,
        "optimizer": "adafactor",
        "lr": 0.3 / 10.7,
        "weight_decay": 1e-5,
        "warmup": 0.0,
        "schedule": "constant",
        "clip": 0.0,
        "average": 0.0,
        "batch_size": 32,
        "steps": 30_000,
        "patience": 0,
    }
}


def preset(name: str, **overrides: Any) -> TrainConfig:
    """A published recipe, with any field overridden.

    Raises:
        ConfigError: an unknown name or value.
    """
    if name not in PRESETS:
        raise ConfigError(f"the preset must be one of {', '.join(PRESETS)}, not {name!r}")
    settings = {**PRESETS[name], **overrides}
    if overrides.get("epochs") is not None:
        settings["steps"] = None
    return replace(TrainConfig(), **settings)
