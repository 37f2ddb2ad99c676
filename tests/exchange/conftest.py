"""The stand-in of the Hugging Face Hub, and a base model, for the tests of both directions."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from softprompt.model.frozen import FrozenLM
from tests.conftest import tiny
from tests.fake_hub import FakeHub, running


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with running(monkeypatch) as found:
        yield found


@pytest.fixture(scope="session")
def lm() -> FrozenLM:
    return tiny("llama")
