"""The order of the house: a room imports from rooms above it only, and no module waits for itself.

Every import counts, also those inside functions and those for types alone. The order is that of the list of rooms in
``docs/explain/design.md``.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import softprompt

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "softprompt"
FACADE = ("softprompt", "softprompt.__main__")
"""The public names and the way in; of all rooms, only the last one knows of them."""


def rooms(page: str) -> list[str]:
    """The rooms of the design page, from the ground up."""
    section = page.split("\n## Rooms\n")[1].split("\n## ")[0]
    return [name.removesuffix(".py") for name in re.findall(r"^\| `(\w+)(?:/|\.py)` \|", section, re.MULTILINE)]


ROOMS = rooms((ROOT / "docs" / "explain" / "design.md").read_text(encoding="utf-8"))


def modules(package: Path) -> dict[str, Path]:
    """Every module by its dotted name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(source: str, known: set[str]) -> Iterator[tuple[int, str]]:
    """Line and name of every module in ``known`` that a source imports, wherever it does."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: an import relative to its folder"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if name not in known:
                    name = str(node.module)
                if name in known:
                    yield node.lineno, name


def arrows(package: Path) -> list[tuple[str, str, str]]:
    """Module, module that it imports, and where: ``model/frozen.py:12``."""
    found, known = modules(package), set(modules(package))
    return [
        (module, other, f"{path.relative_to(package)}:{line}")
        for module, path in found.items()
        for line, other in imports(path.read_text(encoding="utf-8"), known)
    ]


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def upward(found: list[tuple[str, str, str]], order: list[str]) -> list[str]:
    """What imports from a room below its own, or from the facade."""
    place = {name: index for index, name in enumerate(order)}
    return [
        f"{where} imports {other}, which is {'the facade' if other in FACADE else f'below {room(module)}/'}"
        for module, other, where in found
        if module not in FACADE
        and (room(module) != order[-1] if other in FACADE else place[room(other)] > place[room(module)])
    ]


def circle(found: list[tuple[str, str, str]]) -> list[str]:
    """The modules of a circle, the first once more at its end; empty if there is none."""
    graph: dict[str, set[str]] = {}
    for module, other, _ in found:
        graph.setdefault(module, set()).add(other)
    done: set[str] = set()
    for start in graph:
        way = [(start, iter(sorted(graph[start])))]
        on_the_way = [start]
        while way:
            after = next(way[-1][1], None)
            if after is None:
                done.add(way.pop()[0])
                on_the_way.pop()
            elif after in on_the_way:
                return [*on_the_way[on_the_way.index(after) :], after]
            elif after not in done:
                way.append((after, iter(sorted(graph.get(after, ())))))
                on_the_way.append(after)
    return []


def build(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / "softprompt" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "softprompt"


def test_it_finds_arrows_that_run_back_up_and_circles(tmp_path: Path) -> None:
    package = build(
        tmp_path,
        {
            "__init__.py": "",
            "low/__init__.py": "",
            "low/a.py": "def late():\n    from softprompt.high import b\n",
            "low/c.py": "import softprompt\n",
            "high/__init__.py": "",
            "high/b.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from softprompt.low.a import late\n",
        },
    )
    found = arrows(package)
    assert upward(found, ["low", "high"]) == [
        "low/a.py:2 imports softprompt.high.b, which is below low/",
        "low/c.py:1 imports softprompt, which is the facade",
    ]
    assert circle(found) == ["softprompt.high.b", "softprompt.low.a", "softprompt.high.b"]
    assert circle([one for one in found if one[0] != "softprompt.high.b"]) == []
    assert upward(found[:1], ["low", "high"]) == []


def test_the_design_page_lists_every_room() -> None:
    assert sorted(ROOMS) == sorted({room(module) for module in modules(PACKAGE)} - {"softprompt", "__main__"})


def test_no_room_imports_from_one_below_it() -> None:
    assert upward(arrows(PACKAGE), ROOMS) == []


def test_no_module_imports_itself_round_a_circle() -> None:
    assert " → ".join(circle(arrows(PACKAGE))) == ""


def test_every_public_name_is_there() -> None:
    assert [name for name in softprompt.__all__ if not hasattr(softprompt, name)] == []
    assert set(softprompt.__all__) <= set(dir(softprompt))
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        softprompt.no_such_name  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["-h"], ["no-such-command"]])
def test_what_needs_no_model_loads_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom softprompt.cli.main import main\nmain(sys.argv[1:])\n"
        "print('loaded:', *sorted({'numpy', 'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded:"
    assert done.stdout.splitlines()[:-1] or done.stderr
