"""Calls side by side give what calls one by one give, in their order."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from qconvert.numerics.threads import side_by_side


@pytest.fixture
def two() -> Iterator[None]:
    """Torch on two threads, as on a machine of two processors."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize("jobs", [1, 2, 3])
def test_results_come_in_the_order_of_the_items_from_threads_of_one_thread_each(jobs: int) -> None:
    meeting = threading.Barrier(jobs, timeout=60)

    def call(n: int) -> tuple[int, int]:
        meeting.wait()  # as many calls as there are jobs run at once
        return n, torch.get_num_threads()

    with side_by_side(jobs) as each:
        assert list(each(call, range(6))) == [(n, 1) for n in range(6)]
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_error_of_a_call_is_the_caller_s(jobs: int) -> None:
    def fail(n: int) -> int:
        raise ValueError(f"item {n}")

    with side_by_side(jobs) as each, pytest.raises(ValueError, match="item 0"):
        list(each(fail, range(4)))
