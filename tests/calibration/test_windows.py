"""Windows hold every token once and in order; batches are a fixed shuffle that can be entered anywhere."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calibration.windows import batches, cut, token_stream


def test_a_separator_follows_every_document() -> None:
    assert token_stream([[1, 2], [], [3]], separator=9).tolist() == [1, 2, 9, 9, 3, 9]
    assert token_stream([[1, 2], [3]]).tolist() == [1, 2, 3]


@given(length=st.integers(1, 9), tokens=st.integers(9, 60))
def test_windows_are_the_stream_without_its_rest(length: int, tokens: int) -> None:
    windows = cut(torch.arange(tokens), length)
    assert windows.flatten().tolist() == list(range(tokens - tokens % length))
    assert windows.shape[1] == length


def test_a_stream_shorter_than_a_window_is_an_error() -> None:
    with pytest.raises(ValueError, match="3 tokens do not fill one window of 4"):
        cut(torch.arange(3), 4)


@given(size=st.integers(1, 4), start=st.integers(0, 9), seed=st.integers(0, 3))
def test_batches_can_be_entered_anywhere(size: int, start: int, seed: int) -> None:
    windows = torch.arange(14).view(7, 2)
    whole = list(islice(batches(windows, size, seed), start + 4))
    late = list(islice(batches(windows, size, seed, start), 4))
    assert all(torch.equal(a, b) for a, b in zip(whole[start:], late, strict=True))


def test_a_pass_takes_no_window_twice_and_the_next_has_another_order() -> None:
    windows = torch.arange(40).view(20, 2)
    drawn = torch.cat([batch[:, 0] for batch in islice(batches(windows, 5, 0), 8)])
    first, second = drawn[:20].tolist(), drawn[20:].tolist()
    assert sorted(first) == sorted(second) == windows[:, 0].tolist()
    assert first != second


def test_fewer_windows_than_a_batch_is_an_error() -> None:
    with pytest.raises(ValueError, match="2 windows do not fill one batch of 3"):
        next(batches(torch.zeros(2, 4), 3, 0))
