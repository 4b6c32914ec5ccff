"""Compiled code is kept on disk, and neither a damaged cache nor none at all changes a result."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numba
import numpy as np
import pytest

SOURCE = '''
from qconvert.numerics.compilation import inner, kernel

@inner
def _half(number):
    return number / 2

@kernel
def halves(numbers):
    """Halves."""
    for k in range(numbers.size):
        numbers[k] = _half(numbers[k])
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    path = tmp_path / "kernels_of_a_test.py"
    path.write_text(SOURCE, encoding="utf-8")
    return path


def fresh(path: Path) -> ModuleType:
    """What a new process would have."""
    spec = importlib.util.spec_from_file_location("kernels_of_a_test", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def works(path: Path) -> bool:
    numbers = np.array([3.0, 0.0, -1.0])
    fresh(path).halves(numbers)
    return numbers.tolist() == [1.5, 0.0, -0.5]


def kept(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.nb[ci]"))


def test_a_second_process_loads_what_the_first_compiled(module: Path) -> None:
    assert works(module)
    before = {path: path.stat().st_mtime_ns for path in kept(module.parent)}
    assert len(before) == 2
    assert works(module)
    assert {path: path.stat().st_mtime_ns for path in kept(module.parent)} == before


@pytest.mark.parametrize(
    "damage", [b"", b"\x80\x05", b"not a pickle", bytes(1000)], ids=["empty", "cut", "text", "zeros"]
)
@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
def test_a_damaged_cache_costs_time_only(module: Path, suffix: str, damage: bytes) -> None:
    assert works(module)
    for path in kept(module.parent):
        if path.suffix == suffix:
            path.write_bytes(damage)
    assert works(module)


def test_no_folder_that_can_be_written(module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocker = module.parent / "file"
    blocker.touch()
    (module.parent / "__pycache__").touch()
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(blocker))
    for name in ("HOME", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(name, str(blocker))
    assert works(module)
    assert kept(module.parent) == []


def test_a_full_disk(module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    assert works(module)
    assert kept(module.parent) == []


def test_what_rounds_nothing_does_not_wait_for_numba() -> None:
    modules = "qconvert.cli.quantize, qconvert.convert, qconvert.numerics.finite, qconvert.numerics.packing"
    script = f"import sys, {modules}; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
