"""``softprompt push`` and ``softprompt pull``."""

from __future__ import annotations

from dataclasses import dataclass, replace

from softprompt.cli.exchange import said
from softprompt.cli.options import Loading
from softprompt.cli.task import template_from
from softprompt.exchange import hub
from softprompt.exchange.anonymous import is_somewhere
from softprompt.exchange.hub_http import require_login, require_repo
from softprompt.files import local_path
from softprompt.soft_prompts.metadata import Header
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from softprompt.soft_prompts.store import Store
from softprompt.terminal.console import print_json, print_rows, stderr
from softprompt.text.verbalizer import Verbalizer


def push(
    name: str,
    repo: str,
    private: bool,
    revision: str | None,
    check: bool,
    base: str | None,
    loading: Loading,
    as_json: bool,
) -> None:
    """Pushes a soft prompt and says where it is.

    Raises:
        HubError: the Hub cannot be reached or refuses.
        StoreError: there is no such soft prompt.
        BaseModelError: the base model cannot be loaded, or is another.
    """
    require_repo(repo)
    soft_prompt = Store().load(name)
    require_login()
    lm = loading.load(base or soft_prompt.base)
    with stderr.status(f"pushing to {repo}"):
        done = hub.push(lm, soft_prompt, repo, private=private, revision=revision, checked=check)
    if as_json:
        print_json(
            {
                "name": soft_prompt.name,
                "repo": done.repo,
                "url": done.url,
                "commit": done.commit,
                "private": done.private,
                "files": dict(done.files),
                "base_model": done.base_model,
                "check": None if done.peft is None else done.peft.as_dict(),
                "without_peft": done.without_peft,
            }
        )
        return
    named = done.base_model or f"not named on the card: {soft_prompt.base} is a place on this machine"
    peft = f"left out: {done.without_peft}" if done.without_peft else said(done.peft, check)
    print_rows(
        [
            ("repository", f"{done.url}{', private' if done.private else ''}"),
            *((file, f"{size:,} bytes") for file, size in done.files.items()),
            ("base model", named),
            ("PEFT", peft),
        ]
    )


@dataclass(frozen=True)
class Wanted:
    """How a soft prompt shall be taken from the Hub; the options of these names."""

    name: str | None
    revision: str | None
    overwrite: bool
    template: str | None
    labels: str | None
    task: int | None
    check: bool


def pull(repo: str, wanted: Wanted, base: str | None, loading: Loading, as_json: bool) -> None:
    """Pulls a soft prompt into the store and says which base model it needs.

    Raises:
        HubError: there is no such repository, it holds no soft prompt, or the Hub cannot be reached.
        ArtifactError: a file of it is not sound.
        StoreError: the name is taken, or none of a store.
    """
    require_repo(repo)
    store, name = Store(), wanted.name or repo.rpartition("/")[2]
    store.path(name)
    if not wanted.overwrite:
        store.require_free(name)
    foreign = hub.Foreign(
        None if base is None else lambda: loading.load(base),
        None if wanted.template is None else template_from(wanted.template).text,
        None if wanted.labels in (None, "none") else Verbalizer.parse(str(wanted.labels)),
        wanted.task,
        wanted.check,
    )
    with stderr.status(f"pulling {repo}"):
        found = hub.pull(repo, name=name, revision=wanted.revision, foreign=foreign)
    soft_prompt = _at_home(found.soft_prompt, store)
    stored = store.save(soft_prompt, overwrite=wanted.overwrite)
    if as_json:
        print_json(
            {
                "name": name,
                "path": str(stored),
                "repo": repo,
                "commit": found.commit,
                "kind": found.kind,
                "base": soft_prompt.base,
                "base_fingerprint": soft_prompt.base_fingerprint,
                "num_virtual_tokens": soft_prompt.num_virtual_tokens,
                "check": None if found.checked is None else found.checked.as_dict(),
            }
        )
        return
    rows = [
        ("soft prompt", f"{name}, {soft_prompt.extent}"),
        ("file", str(stored)),
        ("from", f"{repo}, commit {found.commit}"),
        ("needs", f"the base model {soft_prompt.base} (fingerprint {soft_prompt.base_fingerprint[:12]})"),
    ]
    if found.kind != "softprompt":
        rows += [("template", soft_prompt.template), ("check", said(found.checked, wanted.check))]
    print_rows(rows)


def _at_home(soft_prompt: SoftPrompt, store: Store) -> SoftPrompt:
    """A soft prompt whose base model was a place on another machine, with the place that one of the store has it at."""
    if not is_somewhere(soft_prompt.base):
        return soft_prompt
    headers = [entry.header for entry in store.entries() if isinstance(entry.header, Header)]
    same = (one.base for one in headers if one.base_fingerprint == soft_prompt.base_fingerprint)
    return replace(soft_prompt, base=next((base for base in same if local_path(base).exists()), soft_prompt.base))
