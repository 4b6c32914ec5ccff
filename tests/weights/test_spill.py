"""What waits on disk comes back bit for bit, memory keeps its limit, and no file is left behind."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qconvert.core.errors import OutputError
from qconvert.weights.spill import SpillStore

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.int16, torch.int64, torch.bool)


def bits(value: Tensor) -> bytes:
    return value.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)


@pytest.mark.parametrize("limit", [0, 1 << 20])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_comes_back(limit: int, dtype: torch.dtype) -> None:
    raw = torch.randint(0, 256, (3, 5, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    value = (raw & 1).bool() if dtype == torch.bool else raw.view(dtype)  # NaN, infinities and subnormals too
    cases = {"whole": value, "turned": value.mT, "part": value[1:, 2], "empty": value[:0], "one": value[0, 0, 0]}
    with SpillStore(limit) as store:
        for key, case in cases.items():
            store.put(key, case)
        for key, case in cases.items():
            assert same(store.get(key), case), key


@given(
    limit=st.integers(0, 400),
    steps=st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from([0, 1, 7, 30]), st.booleans()), max_size=40),
)
def test_it_is_a_dictionary_whatever_the_order(limit: int, steps: list[tuple[str, int, bool]]) -> None:
    known: dict[str, Tensor] = {}
    with SpillStore(limit) as store:
        for number, (key, size, put) in enumerate(steps):
            if put:
                known[key] = torch.full((size,), float(number))
                store.put(key, known[key])
            elif key in known:
                store.drop(key)
                del known[key]
            else:
                with pytest.raises(KeyError):
                    store.drop(key)
                with pytest.raises(KeyError):
                    store.get(key)
            assert sum(value.nbytes for value in store._memory.values()) == store._held <= limit
            assert all(same(store.get(name), value) for name, value in known.items())


def test_memory_keeps_its_limit_and_does_not_hold_what_a_view_looks_into() -> None:
    with SpillStore(1000) as store:
        store.put("view", torch.zeros(1000)[:10])
        store.put("large", torch.zeros(1000))
        kept = store._memory
        assert kept.keys() == {"view"}
        assert kept["view"].untyped_storage().nbytes() == 40


def test_batches_that_come_back_in_their_own_sizes_take_no_more_room() -> None:
    sizes = (30, 50, 30, 20)
    with SpillStore(0) as store:
        for layer in range(5):
            for batch, size in enumerate(sizes):
                store.put(f"hidden.{batch}", torch.full((size,), float(layer)))
        assert store._end == 4 * sum(sizes)


@pytest.mark.parametrize("end", ["close", "error"])
def test_no_name_is_left_in_the_folder(tmp_path: Path, end: str) -> None:
    store = SpillStore(0, tmp_path)
    assert list(tmp_path.iterdir()) == []
    store.put("../../a/\0name", torch.ones(3))
    assert torch.equal(store.get("../../a/\0name"), torch.ones(3))
    if end == "error":
        with pytest.raises(RuntimeError), store:
            raise RuntimeError
    else:
        store.close()
    assert list(tmp_path.iterdir()) == []
    assert store._file._file is None
    with pytest.raises(KeyError):
        store.get("../../a/\0name")


def test_a_killed_process_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, torch; from pathlib import Path; from qconvert.weights.spill import SpillStore\n"
        "SpillStore(0, Path(sys.argv[1])).put('a', torch.ones(99)); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_error_that_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with SpillStore(0, tmp_path) as store:
        store.put("before", torch.ones(3))
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", _full)
            with pytest.raises(OutputError, match=r"cannot write 20 bytes .*No space left on device.*TMPDIR") as caught:
                store.put("late", torch.ones(5))
            assert str(tmp_path) in str(caught.value)
        with pytest.raises(KeyError):
            store.get("late")
        assert torch.equal(store.get("before"), torch.ones(3))
        store.put("later", torch.zeros(5))
        assert torch.equal(store.get("later"), torch.zeros(5))


def _full(*_: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with SpillStore(0, tmp_path / "gone") as store, pytest.raises(OutputError, match="gone: cannot write"):
        store.put("a", torch.ones(3))
