"""The commands that train: one soft prompt, several, or the best of many settings."""

from __future__ import annotations

from typing import Annotated

import typer

from softprompt.cli.groups import Learning, LearningOnce, Mixing, Output, Sweeping
from softprompt.cli.options import (
    FROZEN,
    SOURCE,
    ColumnOptions,
    Form,
    Json,
    Labels,
    Loading,
    SharedLoading,
    Train,
    Validation,
    data_option,
    expanded,
)
from softprompt.errors import ConfigError


@expanded
def train_command(
    train: Annotated[
        list[str],
        typer.Argument(metavar="TRAIN…", help=f"{SOURCE} Several: a soft prompt of each. Or a plan, YAML or JSON."),
    ],
    *,
    output: Output,
    validation: Validation = None,
    template: Form = "default",
    labels: Labels = None,
    columns: ColumnOptions,
    learning: Learning,
    mixing: Mixing,
    base: Annotated[str | None, FROZEN] = None,
    loading: SharedLoading,
    as_json: Json = False,
) -> None:
    """Tune a soft prompt on labelled or free-text examples and store it.

    The base model stays as it is, bit for bit. Targets that look like labels are taken for labels; a line says so.

    \b
    softprompt train train.jsonl --validation dev.jsonl --name sst2
    softprompt train train.jsonl --name sst2 --init-text "Good or bad?" --epochs 2
    softprompt train qa.csv --name qa --template "{soft_prompt}{question} {target}"
    softprompt train hf:ag_news --input-field text --target-field label --name news
    softprompt train sst2.jsonl trec.jsonl --name "{file}-v2"
    softprompt train sst2.jsonl trec.jsonl --mix --name source
    softprompt train plan.yaml
    """
    from softprompt.cli.many import tune_files, tune_plan
    from softprompt.cli.plan_file import is_plan
    from softprompt.cli.task import Sources
    from softprompt.cli.train import Options, tune

    plans = [source for source in train if is_plan(source)]
    if plans and len(train) > 1:
        raise ConfigError(
            f"Expected the plan {plans[0]} alone, found {len(train)} files; give one plan, or data files."
        )
    sources = Sources(train[0], validation, labels, columns)
    options = Options(sources, template, output, learning, base, loading, as_json)
    if mixing.asked:
        from softprompt.cli.mix import tune_mix

        tune_mix(train, mixing, options)
    elif plans:
        tune_plan(train[0], options)
    elif len(train) > 1:
        tune_files(train, options)
    else:
        tune(options)


@expanded
def sweep_command(
    train: Train,
    *,
    sweeping: Sweeping,
    validation: Annotated[
        str | None, data_option("Rows: half to choose the best by, half to measure it on.", "a tenth of TRAIN")
    ] = None,
    template: Form = "default",
    labels: Labels = None,
    columns: ColumnOptions,
    learning: LearningOnce,
    base: Annotated[str | None, FROZEN] = None,
    loading: Loading,
    as_json: Json = False,
) -> None:
    """Find the best of many settings by successive halving, and say how much of its gain is luck.

    Every combination is trained, all in shared passes. At a ninth and a third of the steps a third goes on; the default
    setting always does. The best is stored.

    \b
    softprompt sweep train.jsonl --validation dev.jsonl --name sst2 --lrs 0.1,0.3,1 --lengths 20,50
    softprompt sweep train.jsonl --name sst2 --seeds 3 --inits auto,vocab --parametrisations plain,residual --steps 600
    """
    from softprompt.cli.sweep import sweep
    from softprompt.cli.task import Sources

    sweep(Sources(train, validation, labels, columns), template, sweeping, learning, base, loading, as_json)
