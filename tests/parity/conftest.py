"""What all tests of parity have in common."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from qconvert.numerics.threads import one_thread


@pytest.fixture(autouse=True)
def same_cuts() -> Iterator[None]:
    """Whole models beside ours run on one thread, as ours do: more of them cut products, and so sums, otherwise."""
    with one_thread():
        yield
