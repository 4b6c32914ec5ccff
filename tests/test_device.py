"""The plain torch expressions, which run on other devices, give the same bytes; a device that is not there is said."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from qconvert import device as module
from qconvert.convert import convert
from qconvert.core.errors import UsageError
from qconvert.device import device_named
from qconvert.numerics import finite, packing, rounding, rounding_compiled
from qconvert.verify import verify
from tests.checkpoints import make_tiny
from tests.cli.test_commands import run
from tests.test_convert import POLICIES, digest
from tests.tolerances import tolerances

OPTIONS: dict[str, list[str]] = {
    "int4": ["--group", "32"],
    "int4-asym": ["--group", "32", "--asymmetric"],
    "int4-search": ["--group", "32", "--search"],
    "int8": ["--scheme", "int8"],
    "fp8": ["--scheme", "fp8"],
    "fp8-block": ["--scheme", "fp8-block"],
    "fp8-tiles": ["--scheme", "fp8-block", "--format", "compressed-tensors"],
    "nvfp4": ["--scheme", "nvfp4"],
    "gptq": ["--group", "32", "--format", "gptq"],
    "awq": ["--group", "32", "--asymmetric", "--format", "awq"],
    "nf4": ["--scheme", "nf4"],
    "llm-int8": ["--scheme", "llm-int8"],
}


@pytest.fixture(autouse=True)
def a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other tests left in memory does not count."""
    monkeypatch.setattr("qconvert.memory.resident_bytes", lambda: 300 << 20)


def refuse(*_: object, **__: object) -> Any:
    raise AssertionError("a compiled kernel")


def without_kernels(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(rounding, "has_kernel", lambda scheme: False)
    patch.setattr(rounding_compiled, "quantize_compiled", refuse)
    patch.setattr(packing, "_pack_compiled", packing.pack_with_torch)
    patch.setattr(finite, "_all_finite_compiled", lambda values: bool(torch.isfinite(values).all()))


@pytest.mark.parametrize("name", POLICIES)
def test_plain_expressions_give_the_bytes_of_the_compiled_kernels(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "src"
    make_tiny(source, group=POLICIES[name][1], layers=2, experts=3)
    assert run("quantize", source, tmp_path / "compiled", *OPTIONS[name]).exit_code == 0
    with monkeypatch.context() as patch:
        without_kernels(patch)
        result = run("quantize", source, tmp_path / "plain", *OPTIONS[name], "--device", "cpu")
        assert result.exit_code == 0, result.output
    compiled, plain = digest(tmp_path / "compiled"), digest(tmp_path / "plain")
    manifests = [json.loads((tmp_path / folder / "manifest.json").read_text()) for folder in ("compiled", "plain")]
    # Sums of errors are added up in another order.
    assert {f: h for f, h in compiled.items() if f != "manifest.json"} == {
        f: h for f, h in plain.items() if f != "manifest.json"
    }
    losses = [manifest.pop("sqnr_db") for manifest in manifests]
    assert losses[0] == pytest.approx(losses[1], rel=tolerances("numerics")["loss_of_kernels"])
    assert [manifest.pop("seal") for manifest in manifests]
    assert manifests[0] == manifests[1]
    assert verify(tmp_path / "plain", source).faults == ()


def test_the_hash_is_recorded_and_goes_into_every_line(tmp_path: Path) -> None:
    make_tiny(tmp_path / "src", layers=1)
    assert run("quantize", tmp_path / "src", tmp_path / "out", "--group", "32", "--hash", "sha256").exit_code == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["hash"] == "sha256"
    assert {len(entry["hash"]) for entry in manifest["tensors"].values()} == {64}
    assert run("verify", tmp_path / "out", "--deep", tmp_path / "src").exit_code == 0


@pytest.mark.parametrize("command", ["quantize", "verify"])
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_device_that_is_not_there_is_one_error_before_anything_is_read(
    tmp_path: Path, command: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    result = run(
        command, tmp_path / "nothing here", *([tmp_path / "out"] if command == "quantize" else []), "--device", device
    )
    assert result.exit_code == 2
    assert f"device {device} is not there" in result.stderr
    assert "CUDA build" in result.stderr and "--device cpu" in result.stderr
    assert os.listdir(tmp_path) == []
    with pytest.raises(UsageError, match="is not there"):
        convert(tmp_path / "nothing here", tmp_path / "out", POLICIES["int8"][0], device=torch.device(device))


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="finds no GPU: check the driver"):
        device_named("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_named("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UsageError, match="the last of 2 is cuda:1"):
        device_named("cuda:2")
    with pytest.raises(UsageError, match="cannot round"):
        module.check_device(torch.device("meta"))
    for name in ("", "CPU", "cuda:-1", "cuda:999", "cuda:1\n", "mps"):
        with pytest.raises(UsageError, match="is unknown"):
            device_named(name)
