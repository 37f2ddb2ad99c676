"""Soft prompts out and in: other tools, transformers' own generate, the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from softprompt.api import require_model
from softprompt.errors import ConfigError
from softprompt.files import StrPath
from softprompt.model.frozen import FrozenLM
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.tasks.inputs import Input, examples_of
from softprompt.tasks.reading import Labels, verbalizer_of

if TYPE_CHECKING:
    import torch

    from softprompt.exchange.check import Checked
    from softprompt.exchange.hub import Pushed


def inputs_for(
    lm: FrozenLM,
    soft_prompt: SoftPrompt,
    inputs: Input | Iterable[Input] | Path,
    *,
    max_new_tokens: int | None = None,
) -> dict[str, torch.Tensor]:
    """What transformers' own ``generate`` takes: ``lm.model.generate(**inputs_for(lm, soft_prompt, texts))``.

    Greedily, it writes what :func:`predict` writes, before the text is cut at stop strings.

    Args:
        lm: the base model; any copy of its weights in transformers takes the result, too.
        soft_prompt: of embeddings, not a KV prefix.
        inputs: as for :func:`predict`.
        max_new_tokens: tokens that are kept free behind each text; None: as many as :func:`predict` writes.

    Returns:
        ``inputs_embeds`` ``[B, T, H]``, padded on the left, and ``attention_mask`` ``[B, T]``; of an encoder–decoder
        padded on the right, and ``decoder_input_ids``.

    Raises:
        BaseModelError: the soft prompt is of another base model.
        ConfigError: a KV prefix, or no input.
        DataError: as for :func:`predict`.
    """
    require_model(lm)
    from softprompt.exchange.embedded import embedded

    return embedded(lm, soft_prompt, examples_of(soft_prompt, inputs), max_new_tokens)


def export(
    lm: FrozenLM, soft_prompt: SoftPrompt, folder: StrPath, to: str = "peft", *, check: bool = True
) -> Checked | None:
    """Writes a soft prompt in the form of another tool, exactly, with a README that says how to use it.

    Args:
        lm: its base model.
        soft_prompt: what to export.
        folder: new or empty.
        to: ``peft``, ``prompt-tuning``, ``prefix-tuning``, ``cartridge``, ``npy`` or ``safetensors``.
        check: compare a few texts with what the other library computes.

    Returns:
        What the check found; None without one, or where PEFT is not installed.

    Raises:
        ConfigError: an unknown format, or one in which this soft prompt has no exact form.
        BaseModelError: the soft prompt is of another base model.
        StoreError: the folder holds something, or cannot be written.
    """
    require_model(lm)
    from softprompt.exchange import exporting

    return exporting.export(lm, soft_prompt, to, folder, checked=check)


def from_peft(
    lm: FrozenLM,
    path: StrPath,
    *,
    name: str = "imported",
    template: str = "{soft_prompt}{input}{target}",
    labels: Labels | None = None,
    task: int | None = None,
    check: bool = True,
) -> SoftPrompt:
    """A soft prompt that PEFT trained, to be used as one of ours; an array in a ``.npy`` or ``.safetensors`` file, too.

    Args:
        lm: the base model that it was trained on.
        path: the folder of prompt tuning, p-tuning, multitask prompt tuning, prefix tuning or a cartridge.
        name: what to call it.
        template: what stood around the text.
        labels: its label set; None: free text.
        task: which task of a multitask prompt, from 0.
        check: compare a few texts with what PEFT computes, where it is installed.

    Raises:
        ArtifactError: the files hold no sound soft prompt, or none of this base model.
        ConfigError: the base model has no place for keys and values, or the check found other answers.
    """
    require_model(lm)
    from softprompt.exchange import importing

    verbalizer = None if labels in (None, "none") else verbalizer_of(labels)
    found = importing.find(path, task)
    soft_prompt, checked = importing.adopt(
        lm, found, name=name, template=template, verbalizer=verbalizer, checked=check
    )
    if checked is not None and not checked.passed:
        raise ConfigError(
            f"Expected the answers of {checked.by}, found others: {checked}; check=False takes it as it is."
        )
    return soft_prompt


def push(
    lm: FrozenLM,
    soft_prompt: SoftPrompt,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    check: bool = True,
) -> Pushed:
    """Puts a soft prompt into a repository of the Hugging Face Hub: its file, PEFT's files, and a model card.

    The login is that of ``HF_TOKEN`` or ``hf auth login``.

    Args:
        lm: its base model.
        soft_prompt: what is pushed.
        repo: ``USER/REPO``, which is made if there is none; ``private``: as a private one.
        revision: a branch, which is made if there is none; None: the main one.
        check: compare a few texts with what PEFT computes from its files, where it is installed.

    Raises:
        HubError: the Hub refuses or cannot be reached, or the repository is public or holds something else.
        BaseModelError: the soft prompt is of another base model.
        ConfigError: PEFT computes other answers from its files.
    """
    require_model(lm)
    from softprompt.exchange import hub

    return hub.push(lm, soft_prompt, repo, private=private, revision=revision, checked=check)


def pull(
    repo: str,
    *,
    name: str | None = None,
    revision: str | None = None,
    lm: FrozenLM | None = None,
    template: str | None = None,
    labels: Labels | None = None,
    task: int | None = None,
    check: bool = True,
) -> SoftPrompt:
    """A soft prompt from a repository of the Hugging Face Hub, which is untrusted: nothing in it is executed.

    Args:
        repo: ``USER/REPO``.
        name: what to call it; None: the last part of ``repo``.
        revision: a branch, tag or commit; None: the main branch.
        lm: its base model, which only a repository of PEFT alone needs; the soft prompt must be of it.
        template, labels, task, check: as for :func:`from_peft`, of a repository of PEFT alone.

    Raises:
        HubError: there is no such repository, it holds no soft prompt, or it cannot be reached.
        ArtifactError: a file of it is not sound.
        BaseModelError: the soft prompt is of another base model than ``lm``.
        ConfigError: PEFT computes other answers.
    """
    from softprompt.exchange import hub

    if lm is not None:
        require_model(lm)
    verbalizer = None if labels in (None, "none") else verbalizer_of(labels)
    foreign = hub.Foreign(None if lm is None else lambda: lm, template, verbalizer, task, check)
    return hub.pull(repo, name=name, revision=revision, foreign=foreign).soft_prompt
