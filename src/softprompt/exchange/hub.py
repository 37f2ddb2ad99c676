"""Soft prompts go to the Hugging Face Hub and come back.

A repository holds ``soft_prompt.safetensors``, which is a soft prompt's own file; the two files of PEFT where it has an
exact form there; and a model card.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi, constants
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

from softprompt.errors import ArtifactError, ConfigError, HubError, SoftPromptError, SoftPromptWarning
from softprompt.exchange import exporting, importing, peft_folder
from softprompt.exchange.anonymous import is_somewhere, without_folders
from softprompt.exchange.card import card, hub_id
from softprompt.exchange.check import Checked
from softprompt.exchange.hub_http import (
    asking,
    bounded_writes,
    chunks,
    endpoint,
    listing,
    page_of,
    printable,
    require_login,
    require_repo,
)
from softprompt.model.frozen import FrozenLM
from softprompt.soft_prompts import artifact
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.tasks.task import Task
from softprompt.text.template import Template
from softprompt.text.verbalizer import Verbalizer

FILE, CARD = "soft_prompt.safetensors", "README.md"
PEFT_FILES = (peft_folder.CONFIG, peft_folder.WEIGHTS)

MAX_BYTES = 4 << 30
"""The most bytes of a soft prompt that are taken from the Hub."""

_HARMLESS = (CARD, ".gitattributes", ".gitignore", "LICENSE")


# --- out -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pushed:
    """What a push did.

    Attributes:
        repo: ``USER/REPO``.
        url: its page.
        commit: what the repository is now.
        private: whether only some can see it.
        files: name → bytes.
        base_model: what the base model is called on the Hub; None where it is a file or folder of this machine.
        peft: what the comparison with PEFT found; None without one.
        without_peft: why there are no files of PEFT; None: there are.
    """

    repo: str
    url: str
    commit: str
    private: bool
    files: Mapping[str, int]
    base_model: str | None
    peft: Checked | None
    without_peft: str | None


def push(
    lm: FrozenLM,
    soft_prompt: SoftPrompt,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    checked: bool = True,
) -> Pushed:
    """What :func:`softprompt.push` does, as one commit; the arguments and errors are its own, and ``checked`` its
    ``check``. The file there names no folders of this machine."""
    require_repo(repo)
    require_login()
    files, peft, without_peft = _files(lm, soft_prompt, repo, revision, checked)
    found = _prepared(repo, private, revision)
    stale = [name for name in PEFT_FILES if name in found["files"] and name not in files]
    operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = [
        *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()),
        *(CommitOperationDelete(path_in_repo=name) for name in stale),
    ]
    with asking(repo), bounded_writes(), _without_bars(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        commit = _api().create_commit(
            repo, operations, commit_message=f"Upload the soft prompt {soft_prompt.name}", revision=revision
        )
    for one in said:
        if not issubclass(one.category, UserWarning):  # the library's own, about its libraries
            continue
        warnings.warn(f"the Hub says: {printable(one.message)}", SoftPromptWarning, stacklevel=2)
    sizes = {name: len(content) for name, content in files.items()}
    return Pushed(
        repo, page_of(repo), str(commit.oid), found["private"], sizes, hub_id(soft_prompt.base), peft, without_peft
    )


def _files(
    lm: FrozenLM, soft_prompt: SoftPrompt, repo: str, revision: str | None, checked: bool
) -> tuple[dict[str, bytes], Checked | None, str | None]:
    """The files by name, what PEFT computes from its own, or why there are none of it."""
    task = Task.of(lm, soft_prompt)
    files, peft, without_peft = {FILE: without_folders(soft_prompt).encoded()}, None, None
    with TemporaryDirectory(prefix="softprompt-") as folder:
        try:
            peft = exporting.export(lm, soft_prompt, "peft", folder, checked=checked)
        except ConfigError as error:  # no exact form there
            without_peft = str(error)
        if peft is not None and not peft.passed:
            raise ConfigError(
                f"Expected the answers of PEFT, found log-probabilities that differ by {peft.difference:.2g}; nothing "
                f"was pushed; leave the check out to push it all the same."
            )
        if without_peft is None:
            files |= {name: (Path(folder) / name).read_bytes() for name in PEFT_FILES}
    if without_peft is None and hub_id(soft_prompt.base) is None:
        config = {**json.loads(files[peft_folder.CONFIG]), "base_model_name_or_path": None}
        files[peft_folder.CONFIG] = f"{json.dumps(config, indent=2)}\n".encode()
    page = card(task, soft_prompt, repo, revision, checked=peft, without_peft=without_peft)
    return {**files, CARD: page.encode()}, peft, without_peft


def _prepared(repo: str, private: bool, revision: str | None) -> dict[str, Any]:
    """Makes the repository and the branch where they are missing; what the Hub says of them."""
    with asking(repo), bounded_writes():
        _api().create_repo(repo, private=True if private else None, exist_ok=True)
    found = listing(repo)
    if private and not found["private"]:
        raise HubError(
            f"Expected {repo} to be private, found that it exists and is public; nothing was pushed. Choose another "
            f"name, or make it private at {page_of(repo)}/settings."
        )
    _require_place(repo, found["files"])
    if revision is not None and revision != "main":
        if not revision.startswith("refs/"):
            with asking(repo), bounded_writes():
                _api().create_branch(repo, branch=revision, exist_ok=True)
        found = listing(repo, revision)
        _require_place(repo, found["files"])
    return found


def _require_place(repo: str, names: Collection[str]) -> None:
    """Refuses to put a soft prompt beside something else, whose files of the same names would be lost."""
    other = [name for name in names if name not in _HARMLESS]
    if other and FILE not in other:
        raise HubError(
            f"Expected a new repository, or one with a soft prompt, found {printable(', '.join(sorted(other)))} in "
            f"{repo}; nothing was pushed. Choose another name."
        )


@contextmanager
def _without_bars() -> Iterator[None]:
    """Without the library's progress bars, unless the environment says something about them."""
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is not None or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _api() -> HfApi:
    return HfApi(endpoint=endpoint(), library_name="softprompt")


# --- in ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Pulled:
    """What a repository held.

    Attributes:
        soft_prompt: it.
        commit: what the repository was.
        kind: ``softprompt`` for its own file, or PEFT's ``peft_type``.
        checked: what the comparison with PEFT found; None without one.
    """

    soft_prompt: SoftPrompt
    commit: str
    kind: str
    checked: Checked | None = None


@dataclass(frozen=True)
class Foreign:
    """How an adapter of PEFT is taken in, which does not say as much as a soft prompt's own file.

    Attributes:
        load: gives its base model; None: it is refused. A soft prompt's own file is compared with that base model, and
            takes its id if it says only that it was a place on another machine.
        template: what stood around the text; None: nothing.
        verbalizer: label → words; None: free text.
        task: which task of a multitask prompt, from 0.
        checked: compare a few texts with what PEFT computes, where it is installed.
    """

    load: Callable[[], FrozenLM] | None = None
    template: str | None = None
    verbalizer: Verbalizer | None = None
    task: int | None = None
    checked: bool = True


def pull(repo: str, *, name: str | None = None, revision: str | None = None, foreign: Foreign = Foreign()) -> Pulled:
    """Takes a soft prompt from a repository of the Hub, and nothing else that lies there.

    Its own file goes before PEFT's. Sizes are bounded before and while something is read; nothing is unpickled or
    executed.

    Args:
        repo: ``USER/REPO``.
        name: what to call it; None: the last part of ``repo``.
        revision: a branch, tag or commit; None: the main branch.
        foreign: how an adapter of PEFT is taken in.

    Raises:
        HubError: there is no such repository, it holds no soft prompt, or it cannot be reached.
        ArtifactError: a file of it is not sound.
        BaseModelError: the soft prompt is of another base model than the one that is given.
        ConfigError: PEFT computes other answers, or its own file is there and says what is given, too.
    """
    require_repo(repo)
    found = listing(repo, revision)
    sizes: dict[str, int | None] = found["files"]
    own = _own(sizes)
    if own is None and PEFT_FILES[0] not in sizes:
        raise _nothing(repo, list(sizes))
    if own is not None and (foreign.template, foreign.verbalizer, foreign.task) != (None, None, None):
        raise ConfigError(
            f"Expected no template, labels or task for {repo}, whose {own} says them; they are for adapters of PEFT "
            f"alone. Leave them out."
        )
    at = f"{repo}/resolve/{found['commit']}"
    called = name or repo.rpartition("/")[2]
    with TemporaryDirectory(prefix="softprompt-") as folder:
        try:
            if own is not None:
                path = Path(folder) / FILE
                _download(repo, f"/{at}/{own}", path, sizes[own], _require_ours, most=MAX_BYTES)
                soft_prompt = replace(SoftPrompt.load(path), name=called)
                _require_usable(soft_prompt, repo)
                if foreign.load is not None:
                    lm = foreign.load()
                    Task.of(lm, soft_prompt)
                    if is_somewhere(soft_prompt.base):
                        soft_prompt = replace(soft_prompt, base=lm.name)
                return Pulled(soft_prompt, found["commit"], "softprompt")
            return _pulled_from_peft(repo, at, Path(folder), sizes, called, found["commit"], foreign)
        except SoftPromptError as error:
            if folder not in str(error):
                raise
            raise type(error)(
                str(error).replace(str(Path(folder) / FILE), f"{repo}/{own}").replace(folder, repo)
            ) from None


def _own(names: Mapping[str, Any]) -> str | None:
    """The soft prompt's own file: by its name, or the only one that was put there by hand."""
    if FILE in names:
        return FILE
    if PEFT_FILES[0] in names:
        return None
    others = [name for name in names if name.endswith(artifact.SUFFIX) and _is_plain(name)]
    return others[0] if len(others) == 1 else None


def _is_plain(name: str) -> bool:
    return name.isascii() and all(letter.isalnum() or letter in "._-" for letter in name)


def _nothing(repo: str, names: Sequence[str]) -> HubError:
    if pickled := [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"))]:
        return HubError(
            f"Expected a soft prompt in {repo}, found {printable(pickled[0])}, a pickle, which could run code and is "
            f"not read; ask for {FILE}, or for an adapter that PEFT saved as safetensors."
        )
    shown = printable(", ".join(sorted(names)[:5])) or "no files"
    return HubError(f"Expected {FILE} or an adapter of PEFT in {repo}, found {shown}; check the name and the revision.")


def _pulled_from_peft(
    repo: str,
    at: str,
    folder: Path,
    sizes: Mapping[str, int | None],
    name: str,
    commit: str,
    foreign: Foreign,
) -> Pulled:
    config, weights = PEFT_FILES
    _download(repo, f"/{at}/{config}", folder / config, sizes[config], None, most=peft_folder.MAX_CONFIG_BYTES)
    named = peft_folder.read_config(folder).get("base_model_name_or_path")
    if weights not in sizes:
        raise _nothing(repo, [file for file in sizes if file != config])
    if foreign.load is None:
        said = f"its files name {printable(named)!r}" if isinstance(named, str) and named else "its files name none"
        raise HubError(
            f"Expected the base model of the PEFT adapter in {repo}, which has no file of softprompt; {said}; give it "
            f"with --base, or in Python with lm=."
        )
    _download(repo, f"/{at}/{weights}", folder / weights, sizes[weights], None, most=MAX_BYTES)
    found = importing.find(folder, foreign.task)
    soft_prompt, checked = importing.adopt(
        foreign.load(),
        found,
        name=name,
        template=foreign.template or importing.DEFAULT_TEMPLATE,
        verbalizer=foreign.verbalizer,
        checked=foreign.checked,
    )
    if checked is not None and not checked.passed:
        raise ConfigError(
            f"Expected the answers of {checked.by}, found log-probabilities that differ by {checked.difference:.2g} "
            f"from those of {repo}; give its template, or leave the check out to take it all the same."
        )
    return Pulled(soft_prompt, commit, found.peft.kind if found.peft else "", checked)


def _download(
    repo: str,
    place: str,
    path: Path,
    size: int | None,
    require: Callable[[Mapping[str, Any], str], None] | None,
    *,
    most: int,
) -> None:
    """Writes a file of the Hub to ``path``; of safetensors, the header is looked at before the rest is read."""
    where = f"{repo}/{place.rpartition('/')[2]}"
    if size is not None and size > most:
        raise HubError(f"Expected at most {most:,} bytes of {where}, found {size:,}; it is no soft prompt's.")
    start, is_known = bytearray(), path.suffix != artifact.SUFFIX
    with closing(chunks(repo, place, where, most=most, size=size)) as body, path.open("wb") as file:
        for chunk in body:
            if not is_known:
                start += chunk
                header = _header(bytes(start[:8]), start, where)
                if header is not None:
                    is_known = True
                    if require is not None:
                        require(header, where)
            file.write(chunk)


def _header(length: bytes, start: bytearray, where: str) -> Mapping[str, Any] | None:
    """The header of a safetensors file, if all of it is there already.

    Raises:
        ArtifactError: it is too long, or no JSON object.
    """
    if len(length) < 8:
        return None
    count = int.from_bytes(length, "little")
    if count > artifact.MAX_HEADER_BYTES:
        raise ArtifactError(
            f"Expected a safetensors header of at most {artifact.MAX_HEADER_BYTES:,} bytes in {where}, found "
            f"{count:,}; it is no soft prompt's."
        )
    if len(start) < 8 + count:
        return None
    try:
        header = json.loads(start[8 : 8 + count])
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise ArtifactError(f"Expected a safetensors file in {where}, found another; check the repository.")
    return header


def _require_ours(header: Mapping[str, Any], where: str) -> None:
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict) or "softprompt" not in metadata:
        raise ArtifactError(
            f"Expected a file that softprompt wrote in {where}, found a safetensors file of something else; check the "
            f"repository."
        )


def _require_usable(soft_prompt: SoftPrompt, repo: str) -> None:
    """Refuses what a sound file can say, but no training writes: it would only be found when it is shown or used."""
    Template(soft_prompt.template)
    if soft_prompt.verbalizer is not None:
        Verbalizer(soft_prompt.verbalizer)
    texts: list[object] = [soft_prompt.base, soft_prompt.parametrisation, soft_prompt.created, *soft_prompt.versions]
    fault = "a name with signs that cannot be printed" if not all(str(text).isprintable() for text in texts) else ""
    for metric in soft_prompt.metrics:
        numbers = [metric.get(key) for key in ("value", "stderr")]
        named = all(isinstance(metric.get(key), str) and metric[key].isprintable() for key in ("split", "metric"))
        if not named or type(metric.get("n")) is not int or not all(isinstance(n, float | int | None) for n in numbers):
            fault = "a metric without its fields"
    if fault:
        raise ArtifactError(f"Expected a soft prompt as softprompt writes it in {repo}, found {fault}; do not use it.")
