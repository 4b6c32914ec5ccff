"""Commands run in the process of all tests; their memory limit is for a process of their own."""

from __future__ import annotations

import pytest

from qconvert import memory


@pytest.fixture(autouse=True)
def a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other tests left in memory does not count."""
    monkeypatch.setattr(memory, "resident_bytes", lambda: 300 << 20)
