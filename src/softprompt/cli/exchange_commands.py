"""The commands that bring soft prompts to other tools and the Hugging Face Hub, and from there: options and help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from softprompt.cli.options import Base, Json, Loading, Name, expanded, flag, model_option, option
from softprompt.exchange.formats import FORMATS

_CHECK = typer.Option("--check/--no-check", help="Compare a few texts with what the other library computes.")


@expanded
def export_command(
    name: Name,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that is new or empty.")],
    to: Annotated[str, option(f"{', '.join(FORMATS)}.", "peft", choices=FORMATS)] = "peft",
    check: Annotated[bool, _CHECK] = True,
    *,
    base: Base = None,
    loading: Loading,
    as_json: Json = False,
) -> None:
    """Write a soft prompt in the form of another tool, exactly, with a README that says how to use it.

    What stands before the soft prompt in its template becomes virtual tokens of its own, since other tools put virtual
    tokens first. The check asks a few texts of both.

    \b
    softprompt export sst2 ./sst2-peft
    softprompt export sst2 ./sst2-kv --to cartridge
    """
    from softprompt.cli.exchange import write

    write(name, folder, to, check, base, loading, as_json)


@expanded
def import_command(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A PEFT folder, or a .npy or .safetensors file.")],
    name: Annotated[str, option("What to call the soft prompt.")],
    overwrite: Annotated[bool, flag("--overwrite", "Replace an earlier one of that name.")] = False,
    template: Annotated[
        str,
        option(
            "What stood around the text, with {soft_prompt}, fields and {target}; \\n: line end.",
            "{soft_prompt}{input}{target}",
        ),
    ] = "{soft_prompt}{input}{target}",
    labels: Annotated[str | None, option("Its labels, a,b or a=word|word,b=word or a .json file.", "free text")] = None,
    task: Annotated[int | None, option("Which task of a multitask prompt, from 0.", min=0)] = None,
    check: Annotated[bool, _CHECK] = True,
    base: Annotated[str | None, model_option("The base model it was trained on.", "as its files say")] = None,
    *,
    loading: Loading,
    as_json: Json = False,
) -> None:
    """Store a soft prompt that another tool trained, to be evaluated, served, inspected and trained further.

    PEFT's prompt tuning, p-tuning, multitask prompt tuning, prefix tuning and cartridges; plain arrays. The check asks
    a few texts of both.

    \b
    softprompt import ./my-peft-adapter --name tweets --template "{soft_prompt}Tweet text: {input} Label:{target}"
    softprompt import prompt.npy --name qa --base ./my-model
    softprompt train more.jsonl --name tweets-2 --init tweets
    """
    from softprompt.cli.exchange import Wanted, read

    wanted = Wanted(name, overwrite, template, labels, task, check)
    read(path, wanted, base, loading, as_json)


@expanded
def push_command(
    name: Name,
    repo: Annotated[str, typer.Argument(metavar="USER/REPO", help="A repository of the Hub; it is made if it is new.")],
    private: Annotated[bool, flag("--private", "Make the repository a private one.")] = False,
    revision: Annotated[str | None, option("A branch, which is made if it is new.", "main")] = None,
    check: Annotated[bool, _CHECK] = True,
    *,
    base: Base = None,
    loading: Loading,
    as_json: Json = False,
) -> None:
    """Share a soft prompt on the Hugging Face Hub, with a model card, and as an adapter of PEFT.

    The login is that of HF_TOKEN or `hf auth login`.

    \b
    softprompt push sst2 me/sst2
    softprompt push sst2 me/sst2 --private --revision seed-1
    """
    from softprompt.cli.hub import push

    push(name, repo, private, revision, check, base, loading, as_json)


@expanded
def pull_command(
    repo: Annotated[str, typer.Argument(metavar="USER/REPO", help="A repository of the Hub.")],
    name: Annotated[str | None, option("What to call the soft prompt.", "REPO")] = None,
    revision: Annotated[str | None, option("A branch, tag or commit.", "main")] = None,
    overwrite: Annotated[bool, flag("--overwrite", "Replace an earlier one of that name.")] = False,
    template: Annotated[
        str | None, option("PEFT alone: what stood around the text, as for import.", "{soft_prompt}{input}{target}")
    ] = None,
    labels: Annotated[str | None, option("PEFT alone: its labels, as for import.", "free text")] = None,
    task: Annotated[int | None, option("PEFT alone: which task of a multitask prompt, from 0.", min=0)] = None,
    check: Annotated[bool, _CHECK] = True,
    base: Annotated[
        str | None, model_option("The base model, which a repository of PEFT alone needs.", "it is not loaded")
    ] = None,
    *,
    loading: Loading,
    as_json: Json = False,
) -> None:
    """Store a soft prompt from the Hugging Face Hub, or an adapter of PEFT that is a prompt.

    What lies there is untrusted: nothing is executed, and sizes are bounded.

    \b
    softprompt pull someone/sst2
    softprompt pull someone/peft-tweets --name tweets --base ./my-model --template "{soft_prompt}{input} Label:{target}"
    """
    from softprompt.cli.hub import Wanted, pull

    pull(repo, Wanted(name, revision, overwrite, template, labels, task, check), base, loading, as_json)
