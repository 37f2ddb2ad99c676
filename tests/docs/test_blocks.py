"""Every block of Python in the front page, the start and the guides runs, with a tiny model in place of the real one.

The blocks of a page run one after another in one namespace, in a folder with small data files. What they print on the
page comes from real runs and is not compared.
"""

from __future__ import annotations

import json
import re
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import openai
import pytest

import softprompt as sp
from softprompt.cli.plan_file import read_plan
from softprompt.cli.train import job_of
from softprompt.model.frozen import FrozenLM
from softprompt.model.request import Sampling
from softprompt.serving.listening import RunningServer
from softprompt.soft_prompts.soft_prompt import SoftPrompt
from tests.conftest import tiny
from tests.fake_hub import running
from tests.fake_llama import llama_cpp, sglang

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "docs" / "index.md", *sorted((ROOT / "docs").glob("[sg][tu]*/*.md"))]
STEPS = 4
"""The most steps that a training on a page does here."""


def blocks(page: Path) -> list[tuple[int, str]]:
    """The blocks of Python of a page, each with the line that it begins at."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text[: match.start(1)].count("\n") + 1, match[1]) for match in found]


def write(path: Path, rows: int) -> None:
    """Rows as the quickstart shows them; those of no two files are the same."""
    found = [
        (f"a {('good', 'bad')[i % 2]} film , {path.stem} {i}", ("positive", "negative")[i % 2]) for i in range(rows)
    ]
    path.write_text("".join(json.dumps({"input": text, "target": label}) + "\n" for text, label in found))


WITH_BLOCKS = [page for page in PAGES if "study" not in page.parts and blocks(page)]


@pytest.fixture
def lm() -> FrozenLM:
    return tiny("llama")


@pytest.fixture
def servers(lm: FrozenLM, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[RunningServer]]:
    """What ``serve`` started: in the background, at any free port."""
    started: list[RunningServer] = []
    serve = sp.serve

    def start(lm: FrozenLM, soft_prompts: Any, **options: Any) -> RunningServer:
        started.append(serve(lm, soft_prompts, **{**options, "port": 0, "block": False}))
        return started[-1]

    monkeypatch.setattr(sp, "serve", start)
    yield started
    for server in started:
        server.close()


@pytest.fixture
def hub(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A stand-in of the Hugging Face Hub for the page about it."""
    with running(monkeypatch) if request.node.callspec.params["page"].name == "hub.md" else nullcontext():
        yield


@pytest.fixture
def small(lm: FrozenLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small data files in the current folder, a tiny model, short trainings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SOFTPROMPT_HOME", str(tmp_path / "home"))
    for name, rows in (("train", 40), ("dev", 8), ("test", 12)):
        write(tmp_path / f"{name}.jsonl", rows)
    train = sp.train

    def shortly(lm: FrozenLM, data: Any, **options: Any) -> SoftPrompt:
        options["steps"] = min(options.get("steps", STEPS), STEPS)
        return train(lm, data, **{**options, "progress": False})

    monkeypatch.setattr(sp, "load_model", lambda base, **_: lm if base == "smollm2-135m" else pytest.fail(base))
    fit_many = sp.fit_many
    monkeypatch.setattr(sp, "train", shortly)
    monkeypatch.setattr(
        sp, "fit_many", lambda lm, jobs, **options: fit_many(lm, jobs, **{**options, "steps": STEPS, "progress": False})
    )
    news = [{"input": f"{('oil', 'the team')[i % 2]} {i}", "target": ("business", "sports")[i % 2]} for i in range(20)]
    shortly(lm, news, name="news").save("news.safetensors")


def test_there_are_pages_with_blocks() -> None:
    names = {page.relative_to(ROOT).as_posix() for page in WITH_BLOCKS}
    assert names >= {"README.md", "docs/start/quickstart.md", "docs/guides/training.md", "docs/guides/serving.md"}


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=lambda page: page.relative_to(ROOT).as_posix())
@pytest.mark.usefixtures("small", "hub")
@pytest.mark.filterwarnings("ignore::softprompt.errors.SoftPromptWarning")  # so short a training learns little
def test_the_blocks_of_a_page_run(
    page: Path,
    lm: FrozenLM,
    servers: list[RunningServer],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if page.name == "lm_eval.md":
        pytest.importorskip("lm_eval")
    if page.name == "serving.md":  # whose client asks a server that was started before
        texts = [{"input": f"name[{i}]", "target": f"The pub {i} is near {i}."} for i in range(8)]
        server = sp.serve(lm, {"e2e_nlg": sp.train(lm, texts, labels="none", num_virtual_tokens=4)})
        client = openai.OpenAI
        monkeypatch.setattr(openai, "OpenAI", lambda **given: client(**{**given, "base_url": f"{server.url}/v1"}))
    if page.name == "other_servers.md":
        monkeypatch.setitem(sys.modules, "llama_cpp", llama_cpp(lm))
        monkeypatch.setattr(urllib.request, "urlopen", lambda request: sglang(lm, request))
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for line, block in blocks(page):
        exec(compile("\n" * (line - 1) + block, str(page), "exec"), namespace)
    if page.name == "other_servers.md":
        [ours] = sp.predict(lm, namespace["prompt"], namespace["text"], sampling=Sampling(max_new_tokens=16))
        assert len(namespace["found"]) > 2
        assert capsys.readouterr().out.splitlines()[-2:] == [ours.text] * 2


def test_the_plan_of_the_guide_is_understood(small: None) -> None:
    text = (ROOT / "docs" / "guides" / "many.md").read_text(encoding="utf-8")
    [plan] = re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    Path("plan.yaml").write_text(plan)
    found = read_plan("plan.yaml", {})
    assert (found.base, [job.name for job in found.jobs]) == ("smollm2-135m", ["films", "films-slow", "films-prefix"])
    assert [job.learning.steps for job in found.jobs] == [600] * 3
    for job in found.jobs:
        job_of(job.name, job.sources, job.template, job.learning, sp.Store())


def test_the_lines_of_the_front_page_are_ten_at_most() -> None:
    ((_, block),) = blocks(ROOT / "README.md")
    assert len([line for line in block.splitlines() if line.strip()]) <= 10


def test_data_files_are_what_the_pages_describe(small: None) -> None:
    row = json.loads(Path("train.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert set(row) == {"input", "target"}
