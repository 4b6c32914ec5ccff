"""Rows are what was put there, in memory or in a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qconvert.weights.rows import RowStore


@given(
    rows=st.integers(1, 50),
    width=st.integers(1, 9),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    data=st.data(),
)
def test_a_file_holds_what_memory_holds(rows: int, width: int, dtype: torch.dtype, data: st.DataObject) -> None:
    with RowStore(rows, width, dtype, limit=1 << 20) as memory, RowStore(rows, width, dtype, limit=0) as file:
        for number in range(3):
            begin = data.draw(st.integers(0, rows - 1))
            value = torch.randn(data.draw(st.integers(1, rows - begin)), width)
            at = torch.tensor(sorted(data.draw(st.sets(st.integers(0, rows - 1)))), dtype=torch.int64)
            added = torch.randn(len(at), width)
            for store in (memory, file):
                store.put(begin, value)
                store.add(at, added.to(dtype))
            assert torch.equal(memory.gather(at), file.gather(at)), number
        assert torch.equal(memory.rows(0, rows), file.rows(0, rows))
        assert torch.equal(memory.gather(torch.arange(rows)), memory.rows(0, rows))


def test_nothing_is_left_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), RowStore(9, 3, torch.float32, limit=0, folder=tmp_path) as store:
        assert bool((store.rows(0, 9) == 0).all())
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
