"""The commands that bring a soft prompt to another task, or to another base model."""

from __future__ import annotations

from typing import Annotated

import typer

from softprompt.cli.groups import Learning, Output
from softprompt.cli.options import (
    ColumnOptions,
    Form,
    Json,
    Labels,
    Loading,
    Name,
    Train,
    completed,
    data_option,
    expanded,
    flag,
    model_option,
    option,
)
from softprompt.data.packages import DEFAULT_BASE
from softprompt.exchange.formats import RECYCLING


@expanded
def transfer_command(
    train: Train,
    sources: Annotated[
        list[str] | None,
        option(
            "Soft prompts of other tasks to try, of one length.",
            "the store's",
            autocompletion=completed((), stored=True),
        ),
    ] = None,
    trial_steps: Annotated[int, option("Optimizer steps to try each start.", 50, min=1)] = 50,
    *,
    output: Output,
    validation: Annotated[str | None, data_option("Rows to choose start and step by.", "a tenth of TRAIN")] = None,
    template: Form = "default",
    labels: Labels = None,
    columns: ColumnOptions,
    learning: Learning,
    base: Annotated[str, model_option("The frozen model of all of them.", DEFAULT_BASE)] = DEFAULT_BASE,
    loading: Loading,
    as_json: Json = False,
) -> None:
    """Tune a soft prompt from the soft prompt of another task, the best of several starts in a short trial.

    All starts, the default one among them, are tried in shared passes; the training goes on from the best.

    \b
    softprompt transfer train.jsonl --name reviews
    softprompt transfer train.jsonl --name reviews --sources sst2 subj --trial-steps 100 --steps 400
    """
    from softprompt.cli.task import Sources
    from softprompt.cli.train import Options, tune
    from softprompt.cli.transfer import Search

    search = Search(tuple(sources or ()), trial_steps)
    data = Sources(train, validation, labels, columns)
    tune(Options(data, template, output, learning, base, loading, as_json), search)


@expanded
def recycle_command(
    name: Name,
    base: Annotated[str, model_option("The other base model.")],
    new_name: Annotated[str, typer.Option("--name", help="What to call the new soft prompt.", show_default=False)],
    method: Annotated[str, option(f"{', '.join(RECYCLING)}.", RECYCLING[0], choices=RECYCLING)] = RECYCLING[0],
    test: Annotated[str | None, data_option("Rows with targets, to measure what it is worth.")] = None,
    old_base: Annotated[str | None, model_option("Its base model, where it has moved since.", "as in training")] = None,
    overwrite: Annotated[bool, flag("--overwrite", "Replace an earlier one of that name.")] = False,
    *,
    columns: ColumnOptions,
    loading: Loading,
    as_json: Json = False,
) -> None:
    """Carry a soft prompt over to another base model without training, by the tokens that both have.

    With --test it is measured beside the other base model alone and an untrained default start. Often it is no better
    than these; a training can start from it.

    \b
    softprompt recycle sst2 --base ./other-model --name sst2-other --test test.jsonl
    softprompt train train.jsonl --base ./other-model --name sst2-tuned --init sst2-other
    """
    from softprompt.cli.recycle import Wanted, carry

    carry(name, Wanted(new_name, base, method, old_base, overwrite), test, columns, loading, as_json)
