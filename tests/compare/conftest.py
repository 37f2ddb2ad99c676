"""Fixtures of the tests of comparisons."""

from __future__ import annotations

import pytest

from tests.compare.made_up import RAN, MadeUp, fails, says


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> MadeUp:
    """Three methods in the place of all others, and nothing has run yet."""
    RAN.clear()
    made = MadeUp(monkeypatch)
    made["zero-shot"] = says(["negative"], "zero-shot")
    made["soft-prompt"] = says(["negative", "positive", "positive"], "soft-prompt")
    made["lora"] = fails
    return made
