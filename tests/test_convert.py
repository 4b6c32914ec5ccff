"""Whole conversions: the same bytes whatever the threads, nothing visible after a failure, nothing lost."""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import os
import re
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qconvert.convert import convert, plan_conversion
from qconvert.core.errors import DataError, OutputError, PlanError, QconvertError, SourceError
from qconvert.core.plan import Step
from qconvert.core.scheme import int4
from qconvert.io.checkpoint import Checkpoint
from qconvert.io.shard_writer import ShardWriter
from qconvert.plan import row_blocks
from qconvert.plan.policy import Policy, Rule, default_policy, scheme_named
from tests.checkpoints import Layout, make_tiny

POLICIES: dict[str, tuple[Policy, int]] = {
    "int4": (default_policy(int4(32)), 32),
    "int4-asym": (default_policy(int4(32, symmetric=False)), 32),
    "int4-search": (default_policy(int4(32), search=True), 32),
    "int8": (default_policy(scheme_named("int8")), 32),
    "fp8": (default_policy(scheme_named("fp8")), 32),
    "fp8-block": (default_policy(scheme_named("fp8-block")), 128),
    "fp8-tiles": (default_policy(scheme_named("fp8-block")).stored_as("compressed-tensors"), 128),
    "nvfp4": (default_policy(scheme_named("nvfp4")), 32),
    "gptq": (default_policy(int4(32)).stored_as("gptq"), 32),
    "awq": (default_policy(int4(32, symmetric=False)).stored_as("awq"), 32),
    "nf4": (default_policy(scheme_named("nf4")), 32),
    "llm-int8": (default_policy(scheme_named("llm-int8")), 32),
}


def digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found.update(load_file(file))
    return found


def manifest_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return found


@pytest.mark.parametrize("name", POLICIES)
def test_bytes_do_not_depend_on_jobs_or_block_size(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, group = POLICIES[name]
    make_tiny(tmp_path / "src", group=group)
    convert(tmp_path / "src", tmp_path / "one", policy, jobs=1)
    convert(tmp_path / "src", tmp_path / "many", policy, jobs=5)
    monkeypatch.setattr(row_blocks, "BLOCK_ELEMENTS", 1024)
    convert(tmp_path / "src", tmp_path / "blocks", policy, jobs=3)
    assert digest(tmp_path / "one") == digest(tmp_path / "many")
    blocks, whole = digest(tmp_path / "blocks"), digest(tmp_path / "one")
    for file in whole:
        if file != "manifest.json":  # error sums are added up block by block there
            assert blocks[file] == whole[file], file


@pytest.mark.parametrize("layout", ["fused", "per-expert"])
def test_what_engines_stack_has_one_second_scale_from_all_of_it(tmp_path: Path, layout: Layout) -> None:
    make_tiny(tmp_path / "src", layout=layout)
    everywhere = tuple(
        Rule(match=f"text.{match}", scheme=scheme_named("nvfp4"), reason="to see it")
        for match in (
            "attention.query.output_gate",
            "attention.[qkvo]*y",
            "attention.value",
            "attention.output",
            "shared_expert.*",
        )
    )
    convert(tmp_path / "src", tmp_path / "out", default_policy(scheme_named("nvfp4"), rules=everywhere))
    before, after = tensors(tmp_path / "src"), tensors(tmp_path / "out")
    found = {name.removesuffix(".weight_global_scale"): tensor for name, tensor in after.items() if "_global_" in name}
    stacks = {"gate_proj": ("gate_proj", "up_proj"), "q_proj": ("q_proj", "k_proj", "v_proj")}
    seen = 0
    for module, scale in found.items():
        stem, _, part = module.rpartition(".")
        for other in stacks.get(part, ()):
            assert torch.equal(found[f"{stem}.{other}"], scale), module
            seen += 1
        if part == "q_proj":
            largest = max(before[f"{stem}.{other}.weight"].abs().max().item() for other in stacks[part])
            assert 224 < largest / 6 * scale.item() <= 448
    assert seen >= 2 * 3 + 3 and len({scale.item() for scale in found.values()}) > 1


@pytest.mark.parametrize("layout", ["fused", "per-expert"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_kept_tensors_are_carried_bit_for_bit(tmp_path: Path, layout: Layout, dtype: torch.dtype) -> None:
    make_tiny(tmp_path / "src", layout=layout, dtype=dtype)
    done = convert(tmp_path / "src", tmp_path / "out", default_policy(int4(32)))
    before, after = tensors(tmp_path / "src"), tensors(tmp_path / "out")
    experts = {name for name in before if ".mlp.experts." in name and not name.startswith("mtp.")}
    kept = set(before) - experts
    assert kept
    for name in kept:
        assert after[name].dtype == before[name].dtype
        assert torch.equal(after[name], before[name]), name
    assert set(manifest_of(tmp_path / "out")["tensors"]) == set(after)
    assert done.bytes_after == sum(t.nbytes for t in after.values())


def test_side_files_come_along_and_metadata_is_there(tmp_path: Path) -> None:
    make_tiny(tmp_path / "src")
    (tmp_path / "src" / "tokenizer.json").write_text("{}")
    (tmp_path / "src" / "chat_template.jinja").write_text("hello")
    (tmp_path / "src" / "code.py").write_text("raise SystemExit")
    (tmp_path / "src" / "notes: old.txt").write_text("no name on every system")
    done = convert(tmp_path / "src", tmp_path / "out", default_policy(int4(32)))
    assert {name for name, _ in done.plan.left_out} == {"code.py", "notes: old.txt"}
    names = set(os.listdir(tmp_path / "out"))
    assert {"tokenizer.json", "chat_template.jinja", "config.json", "manifest.json"} <= names
    assert "code.py" not in names
    for file in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["mlp.experts.gate_up_proj", "linear_attn.in_proj_z.weight", "mtp.norm.weight"])
def test_a_weight_that_is_not_finite_is_named_and_nothing_is_left(tmp_path: Path, value: float, where: str) -> None:
    make_tiny(tmp_path / "src", shards=1)
    file = tmp_path / "src" / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith(where))
    weights[name].view(-1)[-3] = value
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(DataError) as raised:
        convert(tmp_path / "src", tmp_path / "out", default_policy(int4(32)))
    assert name in str(raised.value)
    assert "model.safetensors" in str(raised.value)
    assert os.listdir(tmp_path) == ["src"]


def test_an_existing_output_is_never_touched(tmp_path: Path) -> None:
    make_tiny(tmp_path / "src")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    with pytest.raises(OutputError, match="out"):
        convert(tmp_path / "src", tmp_path / "out", default_policy(int4(32)))
    assert os.listdir(tmp_path / "out") == ["precious"]
    assert sorted(os.listdir(tmp_path)) == ["out", "src"]


@pytest.mark.parametrize("call", ["pwrite", "fsync", "fdatasync", "ftruncate"])
def test_a_refusing_disk_is_one_error_and_leaves_nothing(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tiny(tmp_path / "src")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(OutputError, match=r"[Nn]o space|full"):
        convert(tmp_path / "src", tmp_path / "out", default_policy(int4(32)))
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["src"]


def test_a_limit_below_the_largest_step_is_refused_before_writing(tmp_path: Path) -> None:
    make_tiny(tmp_path / "src")
    with pytest.raises(PlanError, match="--max-memory"):
        convert(tmp_path / "src", tmp_path / "out", default_policy(int4(32)), max_memory=1000)
    assert os.listdir(tmp_path) == ["src"]


def test_the_record_names_every_decision(tmp_path: Path) -> None:
    make_tiny(tmp_path / "src")
    rule = Rule(match="text.shared_expert.*", scheme=scheme_named("int8"), reason="because")
    convert(tmp_path / "src", tmp_path / "out", default_policy(int4(32), rules=(rule,)))
    record = manifest_of(tmp_path / "out")
    decided = {line["role"]: line for line in record["decisions"]}
    assert decided["text.shared_expert.up"]["reason"] == "because"
    assert decided["text.expert.down"]["action"].startswith("int4-g32-sym")
    assert sum(line["bytes"] for line in record["decisions"]) == sum(
        t.nbytes for t in tensors(tmp_path / "out").values()
    )
    assert all(line["reason"] for line in record["decisions"])


def test_a_source_that_shrinks_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tiny(tmp_path / "src", shards=1)
    file = tmp_path / "src" / "model.safetensors"
    from qconvert import rounding_by as module

    def shrink_then_run(*args: object, **options: object) -> object:
        os.truncate(file, file.stat().st_size // 2)
        return original(*args, **options)  # type: ignore[arg-type]

    original = module.run
    monkeypatch.setattr(module, "run", shrink_then_run)
    with pytest.raises(QconvertError, match=r"model\.safetensors"):
        convert(tmp_path / "src", tmp_path / "out", default_policy(int4(32)))
    assert os.listdir(tmp_path) == ["src"]


def hub_cache(source: Path, cache: Path) -> Path:
    """The layout of a hub cache: a snapshot of links into a folder of blobs with other names."""
    blobs, snapshot = cache / "blobs", cache / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(source.iterdir())):
        file.rename(blobs / f"{number:040x}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{number:040x}")
    return snapshot


@pytest.mark.parametrize("kind", ["single file", "hub cache", "tied", "no mtp", "text only", "five shards"])
def test_sources_as_people_have_them(tmp_path: Path, kind: str) -> None:
    source = tmp_path / "src"
    make_tiny(
        source,
        shards={"single file": 1, "five shards": 5}.get(kind, 2),
        tie=kind == "tied",
        mtp=kind != "no mtp",
        naming="text" if kind == "text only" else "vl",
        vision=kind != "text only",
    )
    before = tensors(source)
    if kind == "hub cache":
        source = hub_cache(source, tmp_path / "cache")
    convert(source, tmp_path / "out", default_policy(int4(32)))
    after = tensors(tmp_path / "out")
    assert any(name.endswith(".weight_packed") for name in after)
    for name, tensor in before.items():
        if ".mlp.experts." not in name or name.startswith("mtp."):
            assert torch.equal(after[name], tensor), name
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())


def test_running_steps_stay_within_the_memory_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qconvert import run as module

    make_tiny(tmp_path / "src")
    held, most = 0, 0
    lock = threading.Lock()
    original = module.execute

    def watched(step: Step, *rest: Any) -> Any:
        nonlocal held, most
        with lock:
            held += step.peak_bytes
            most = max(most, held)
        time.sleep(0.002)
        try:
            return original(step, *rest)
        finally:
            with lock:
                held -= step.peak_bytes

    monkeypatch.setattr(module, "execute", watched)
    plan = plan_conversion(tmp_path / "src", default_policy(int4(32)))
    limit = plan.largest_step.peak_bytes * 2
    with Checkpoint.open(tmp_path / "src") as source:
        with ShardWriter(tmp_path / "out", plan.layout) as sink:
            module.run(plan, source, sink, jobs=8, memory=limit)
        assert plan.largest_step.peak_bytes < most <= limit
        most = 0
        with ShardWriter(tmp_path / "out", plan.layout) as sink:
            module.run(plan, source, sink, jobs=8, memory=None)
        assert most > limit


def test_steps_that_wait_hold_nothing_of_the_executor(tmp_path: Path) -> None:
    make_tiny(tmp_path / "src")
    futures: list[int] = []
    calls = itertools.count()
    gc.collect()  # other tests' futures

    def look(done: int, total: int) -> None:
        if next(calls) % 16 == 1:  # counting takes a tenth of a second
            futures.append(sum(type(each) is Future for each in gc.get_objects()))

    convert(tmp_path / "src", tmp_path / "out", default_policy(int4(32)), jobs=3, progress=look)
    assert next(calls) > 100 and len(futures) > 5
    assert max(futures) < 20  # of threads, not of steps


def test_a_side_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    make_tiny(tmp_path / "src")
    (tmp_path / "src" / "tokenizer.json").symlink_to(tmp_path / "gone")
    with pytest.raises(SourceError, match=r"tokenizer\.json"):
        convert(tmp_path / "src", tmp_path / "out", default_policy(int4(32)))


def test_weights_too_large_for_f16_scales_are_named(tmp_path: Path) -> None:
    make_tiny(tmp_path / "src", shards=1)
    file = tmp_path / "src" / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("experts.down_proj") and "mtp" not in name)
    weights[name].view(-1)[5] = 1e6
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(DataError, match=f"{re.escape(name)}.*too large for F16 scales"):
        convert(tmp_path / "src", tmp_path / "out", default_policy(int4(32)).stored_as("gptq"))
    convert(tmp_path / "src", tmp_path / "out", default_policy(int4(32)))
