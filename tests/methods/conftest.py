"""The clock of methods that train."""

from __future__ import annotations

import pytest

from softprompt.methods.fine_tuning import Tuner
from tests.methods.trained import Clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A step takes a second, a validation half of one, and everything else nothing."""
    clock = Clock(monkeypatch)
    clock.charge(Tuner, "backward", lambda: 1.0)
    clock.charge_validations(0.5)
    return clock
