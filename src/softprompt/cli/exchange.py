"""``softprompt export`` and ``softprompt import``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from softprompt.cli.options import Loading
from softprompt.cli.task import template_from
from softprompt.errors import ConfigError
from softprompt.exchange import exporting, importing
from softprompt.exchange.check import Checked
from softprompt.files import local_path
from softprompt.soft_prompts.store import Store
from softprompt.terminal.console import print_json, print_rows, stderr
from softprompt.text.verbalizer import Verbalizer

NOT_INSTALLED = 'PEFT is not installed (pip install "softprompt[compare]")'


def write(name: str, folder: Path, to: str, check: bool, base: str | None, loading: Loading, as_json: bool) -> None:
    """Exports a soft prompt and says what the check found.

    Raises:
        ConfigError: it has no exact form in this format, or the check found other answers.
        StoreError: there is no such soft prompt, or the folder is not new or cannot be written.
        BaseModelError: the base model cannot be loaded, or is another.
    """
    soft_prompt = Store().load(name)
    lm = loading.load(base or soft_prompt.base)
    with stderr.status("exporting"):
        found = exporting.export(lm, soft_prompt, to, folder, checked=check)
    path = local_path(folder)
    _require_same(found, f"the files in {path} should not be used")
    files = {file.name: file.stat().st_size for file in sorted(path.iterdir())}
    if as_json:
        print_json({"name": soft_prompt.name, "to": to, "folder": str(path), "files": files, **_as_dict(found)})
        return
    sizes = [(file, f"{size:,} bytes") for file, size in files.items()]
    print_rows([("folder", str(path)), *sizes, ("check", said(found, check))])


@dataclass(frozen=True)
class Wanted:
    """How a soft prompt of another tool shall be taken in; the options of these names."""

    name: str
    overwrite: bool
    template: str
    labels: str | None
    task: int | None
    check: bool


def read(path: str, wanted: Wanted, base: str | None, loading: Loading, as_json: bool) -> None:
    """Imports a soft prompt and says what the check found.

    Raises:
        ArtifactError: the files hold no soft prompt, or none of this base model.
        ConfigError: no base model is named, or the check found other answers.
        StoreError: the name is taken.
    """
    store = Store()
    if not wanted.overwrite:
        store.require_free(wanted.name)
    found = importing.find(path, wanted.task)
    template = template_from(wanted.template).text
    verbalizer = None if wanted.labels in (None, "none") else Verbalizer.parse(str(wanted.labels))
    if not (base or found.base):
        raise ConfigError(f"Expected the base model of {path}, which it does not name; give --base.")
    lm = loading.load(base or found.base)
    with stderr.status("importing"):
        soft_prompt, checked = importing.adopt(
            lm, found, name=wanted.name, template=template, verbalizer=verbalizer, checked=wanted.check
        )
    _require_same(checked, "nothing was stored; --no-check stores it all the same")
    stored = store.save(soft_prompt, overwrite=wanted.overwrite)
    if as_json:
        kind = found.peft.kind if found.peft else "array"
        document = {"name": wanted.name, "path": str(stored), "kind": kind, "base": lm.name}
        print_json({**document, "num_virtual_tokens": soft_prompt.num_virtual_tokens, **_as_dict(checked)})
        return
    print_rows(
        [
            ("soft prompt", f"{wanted.name}, {soft_prompt.extent}"),
            ("file", str(stored)),
            ("base model", lm.name),
            ("template", soft_prompt.template),
            ("check", said(checked, wanted.check)),
        ]
    )


def _require_same(found: Checked | None, remedy: str) -> None:
    if found is not None and not found.passed:
        raise ConfigError(
            f"Expected the answers of {found.by}, found log-probabilities that differ by {found.difference:.2g}; "
            f"{remedy}."
        )


def said(found: Checked | None, asked: bool) -> str:
    """What a check found, or why there was none."""
    return str(found) if found else f"none, {NOT_INSTALLED}" if asked else "none, as asked"


def _as_dict(found: Checked | None) -> dict[str, object]:
    return {"check": None if found is None else found.as_dict()}
