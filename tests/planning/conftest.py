"""Plans are what they are with the newest Triton, whichever is here: nothing in this folder compiles."""

import pytest

from fastrnn.compat import spills
from fastrnn.planning.tiers import TIERS


@pytest.fixture(autouse=True)
def _as_with_the_newest(monkeypatch):
    def forget() -> None:
        for tier in TIERS.values():
            tier.plan.cache_clear()

    if spills.triton_version() < (3, 9):
        monkeypatch.setattr(spills, "triton_version", lambda: (3, 9))
    forget()
    yield
    forget()
