"""Groups of options that belong to one command each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from softprompt.cli.options import PRECISIONS, SEED_RANGE, BaseOnly, Normalise, completed, flag, option
from softprompt.errors import ConfigError
from softprompt.methods.registry import METHODS
from softprompt.serving.limits import Limits
from softprompt.tasks.votes import VOTES
from softprompt.tuning.config import (
    DEFAULT_STEPS,
    INITS,
    LOSSES,
    OPTIMIZERS,
    PARAMETRISATIONS,
    PRESETS,
    SCHEDULES,
    TRACKERS,
    TrainConfig,
)

_D, _L = TrainConfig(), Limits()

Vote = Annotated[
    str | None,
    option(
        f"How several soft prompts answer together: {' or '.join(VOTES)}.",
        "mean of labels, majority of texts",
        choices=VOTES,
    ),
]
DTYPES = ("fp32", "bf16", "fp16")

_run = partial(option, panel="The run")
_learn = partial(option, panel="Learning")
_sweep = partial(option, panel="What is tried")
_compare = partial(option, panel="The comparison")
_door = partial(option, panel="Who may ask")
_limit = partial(option, panel="Limits")
_upstream = partial(option, panel="Servers elsewhere")


@dataclass(frozen=True)
class Output:
    """Where a tuned soft prompt goes."""

    name: Annotated[
        list[str] | None,
        _run("What to call the soft prompt; of several, a name each, or {file} in one.", "each as its file"),
    ] = None
    out: Annotated[Path | None, _run("Write to this .safetensors file instead of the store.")] = None
    resume: Annotated[bool, flag("--resume", "Go on with a run that was stopped.", panel="The run")] = False
    overwrite: Annotated[bool, flag("--overwrite", "Replace an earlier one of that name.", panel="The run")] = False
    track: Annotated[str | None, _run(f"Hand each step to a tracker: {', '.join(TRACKERS)}.", choices=TRACKERS)] = None

    @property
    def one_name(self) -> str | None:
        """The name of a single soft prompt.

        Raises:
            ConfigError: there are several.
        """
        if self.name is not None and len(self.name) > 1:
            raise ConfigError(f"Expected one --name for one data file, found {', '.join(self.name)}; give one of them.")
        return None if self.name is None else self.name[0]


@dataclass(frozen=True)
class Measured:
    """What ``softprompt evaluate`` measures, and on what."""

    metric: Annotated[list[str] | None, option("Only these metrics, the first is the headline.", "all")] = None
    plot: Annotated[Path | None, option("Draw accuracy over confidence to this .png or .svg file.")] = None
    on: Annotated[
        list[str] | None,
        option(
            f"Measure with the base model in these precisions as well: {', '.join((*PRECISIONS, *DTYPES))}.",
            panel="Base model",
            choices=(*PRECISIONS, *DTYPES),
        ),
    ] = None


@dataclass(frozen=True)
class LearningOnce:
    """What was given of a ``TrainConfig`` of one start, and the recipe to start from."""

    preset: Annotated[
        str | None, _learn(f"A published recipe as start: {', '.join(PRESETS)}.", choices=tuple(PRESETS))
    ] = None
    num_virtual_tokens: Annotated[int | None, _learn("How many vectors to learn.", "64, more for many labels")] = None
    decoder_virtual_tokens: Annotated[
        int | None, _learn("How many more stand before the decoder's input, of an encoder-decoder.", 0)
    ] = None
    init: Annotated[
        str | None,
        _learn(
            f"{', '.join(INITS)}, or a soft prompt's name or path.",
            _D.init,
            autocompletion=completed(INITS, stored=True),
        ),
    ] = None
    init_text: Annotated[str | None, _learn("Text to start from.")] = None
    init_scale: Annotated[float | None, _learn("Length of the start in embeddings.", "as the base model asks")] = None
    parametrisation: Annotated[
        str | None, _learn(f"{', '.join(PARAMETRISATIONS)}.", _D.parametrisation, choices=PARAMETRISATIONS)
    ] = None
    loss: Annotated[str | None, _learn(f"{', '.join(LOSSES)}.", _D.loss, choices=LOSSES)] = None
    steps: Annotated[int | None, _learn("Optimizer steps.", DEFAULT_STEPS)] = None
    epochs: Annotated[float | None, _learn("Passes over TRAIN, instead of steps.")] = None
    batch_size: Annotated[int | None, _learn("Examples a step; of conversations, answers.", _D.batch_size)] = None
    lr: Annotated[float | None, _learn("Peak learning rate in RMS of the start.", _D.lr)] = None
    optimizer: Annotated[str | None, _learn(f"{', '.join(OPTIMIZERS)}.", _D.optimizer, choices=OPTIMIZERS)] = None
    schedule: Annotated[str | None, _learn(f"{', '.join(SCHEDULES)}.", _D.schedule, choices=SCHEDULES)] = None
    warmup: Annotated[float | None, _learn("Share of the steps.", _D.warmup)] = None
    clip: Annotated[float | None, _learn("The most that the gradient's norm may be; 0: any.", _D.clip)] = None
    weight_decay: Annotated[float | None, _learn("Decoupled, a factor of lr.", _D.weight_decay)] = None
    average: Annotated[float | None, _learn("Decay of the soft prompt's average over steps; 0: none.", _D.average)] = (
        None
    )
    eval_every: Annotated[int | None, _learn("Steps between validations.", "100, or as fits")] = None
    patience: Annotated[int | None, _learn("Validations worse than the best to stop after; 0: never.", _D.patience)] = (
        None
    )
    validation_rows: Annotated[int | None, _learn("The most validation rows to use.", _D.validation_rows)] = None
    max_length: Annotated[int | None, _learn("The most tokens in one sequence.", "the model's window")] = None
    seed: Annotated[int | None, _learn("Seeds start, order and held-out rows.", _D.seed, **SEED_RANGE)] = None
    checkpoint_every: Annotated[int | None, _run("Steps between checkpoints.", _D.checkpoint_every)] = None
    compile: Annotated[
        str | None, _run("Compile the layers: auto, on, off.", _D.compile, choices=("auto", "on", "off"))
    ] = None
    activation_checkpointing: Annotated[
        str | None,
        _run(
            "Compute activations again instead of keeping them: auto, on, off.",
            _D.activation_checkpointing,
            choices=("auto", "on", "off"),
        ),
    ] = None


@dataclass(frozen=True)
class Learning(LearningOnce):
    """What was given of a ``TrainConfig``, and the recipe to start from."""

    starts: Annotated[int | None, _learn("Short runs of which the best goes on.", _D.starts)] = None
    lengths: Annotated[str | None, _learn("Other numbers of virtual tokens to try likewise, a,b,c.")] = None


@dataclass(frozen=True)
class Mixing:
    """Whether several data files make one soft prompt."""

    mix: Annotated[
        bool, flag("--mix", "One soft prompt of all files or jobs of a plan, to start others from.", panel="Learning")
    ] = False
    cap: Annotated[int | None, _learn("With --mix: the most rows of a file in an epoch.", 2000, min=1)] = None

    @property
    def asked(self) -> bool:
        """Whether they do.

        Raises:
            ConfigError: there is a cap without a mix.
        """
        if self.cap is not None and not self.mix:
            raise ConfigError("--cap is for a mix of several files; add --mix, or leave it out.")
        return self.mix


@dataclass(frozen=True)
class Sweeping:
    """Which settings are tried, and where the best goes."""

    name: Annotated[str, _run("What to call the best soft prompt.")]
    seeds: Annotated[int, _sweep("How many seeds, from --seed on.", 1)] = 1
    lrs: Annotated[str | None, _sweep("Learning rates, a,b,c.", "that of --lr")] = None
    lengths: Annotated[str | None, _sweep("Numbers of virtual tokens, a,b,c.", "that of --num-virtual-tokens")] = None
    inits: Annotated[str | None, _sweep(f"Some of {', '.join(INITS)}, with commas.", "that of --init")] = None
    parametrisations: Annotated[
        str | None, _sweep(f"Some of {', '.join(PARAMETRISATIONS)}, with commas.", "that of --parametrisation")
    ] = None
    keep: Annotated[str, _sweep("The share that goes on at each of two rungs; 1: all do.", "1/3")] = "1/3"
    out: Annotated[Path | None, _run("The folder for results.json and the plot.", "the run folder in the store")] = None
    resume: Annotated[bool, flag("--resume", "Go on with a sweep that was stopped.", panel="The run")] = False
    overwrite: Annotated[bool, flag("--overwrite", "Replace an earlier one of that name.", panel="The run")] = False


@dataclass(frozen=True)
class Comparing:
    """What is compared, and for how long."""

    out: Annotated[Path, _compare("The folder for results, soft prompts and report; a comparison goes on there.")]
    methods: Annotated[
        list[str] | None, _compare(f"Some of {', '.join(METHODS)}.", "all that fit", choices=tuple(METHODS))
    ] = None
    instruction: Annotated[list[str] | None, _compare("Hard prompts; the best on validation counts.")] = None
    instructions: Annotated[Path | None, _compare("A file of hard prompts: one a line, or a JSON list.")] = None
    seeds: Annotated[int, _compare("Seeds of each method that draws something.", 1)] = 1
    starts: Annotated[int, _compare("Starts of each soft prompt, the best of which goes on.", 1)] = 1
    budget: Annotated[str, _compare("Time to learn for each cell: 90s, 10m, 1h.", "10m")] = "10m"
    test_rows: Annotated[int | None, _compare("The most test rows, a seeded choice.", "all")] = None
    task: Annotated[str | None, _compare("The task's name in the results.", "as TRAIN")] = None


@dataclass(frozen=True)
class Answering:
    """How soft prompts answer."""

    base_only: BaseOnly = False
    normalise_length: Normalise = False
    vote: Vote = None


@dataclass(frozen=True)
class Door:
    """Where the server listens, and to whom."""

    host: Annotated[str, _door("The address to listen on.", "127.0.0.1")] = "127.0.0.1"
    port: Annotated[int, _door("0: any that is free.", 8000, min=0, max=65535, metavar="<int>")] = 8000
    api_key: Annotated[
        str | None,
        _door(
            "What clients must send as Bearer token; better given as $SOFTPROMPT_API_KEY.", envvar="SOFTPROMPT_API_KEY"
        ),
    ] = None
    allow_loading: Annotated[
        bool, flag("--allow-loading", "Let clients load and unload soft prompts.", panel="Who may ask")
    ] = False


@dataclass(frozen=True)
class Bounds:
    """What the server may use."""

    max_rows: Annotated[int, _limit("The most requests in one forward pass, or at one upstream.", _L.rows)] = _L.rows
    max_tokens: Annotated[
        int, _limit("Tokens of keys and values: rows times the longest; one request's most.", _L.tokens)
    ] = _L.tokens
    max_waiting: Annotated[int, _limit("Requests that wait; more get 503.", _L.waiting)] = _L.waiting
    time_limit: Annotated[float, _limit("Seconds that a request may take.", _L.seconds)] = _L.seconds
    prefix_cache: Annotated[int, _limit("MiB of computed prefixes to keep.", _L.prefix_bytes >> 20)] = (
        _L.prefix_bytes >> 20
    )

    def limits(self) -> Limits:
        """The same as the engine takes it.

        Raises:
            ConfigError: a number out of its range.
        """
        return Limits(
            rows=self.max_rows,
            tokens=self.max_tokens,
            waiting=self.max_waiting,
            seconds=self.time_limit,
            prefix_bytes=self.prefix_cache << 20,
        )


@dataclass(frozen=True)
class Elsewhere:
    """Servers that compute in place of this machine."""

    backend: Annotated[
        str,
        _upstream("What computes: local, or vllm for servers elsewhere.", "local", choices=("local", "vllm")),
    ] = "local"
    upstream: Annotated[
        list[str] | None, _upstream("URLs of vLLM servers of the base model, started with --enable-prompt-embeds.")
    ] = None
    upstream_api_key: Annotated[
        str | None,
        _upstream(
            "What they want as Bearer token; better given as $SOFTPROMPT_UPSTREAM_API_KEY.",
            envvar="SOFTPROMPT_UPSTREAM_API_KEY",
        ),
    ] = None
    block_size: Annotated[
        int, _upstream("Their --block-size: a warning says which soft prompts do not fill it.", 16, min=1)
    ] = 16
