"""The comparison tells quantized experts from others by headers alone, and its ratios are what they are called."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.comparison.candidates import PEER_KEYS, SCHEMES, ours, peers, versions
from benchmarks.comparison.experts import Stored, experts_found, stored_in
from benchmarks.comparison.floor import read_all, write_all
from benchmarks.comparison.process import failure, run
from benchmarks.comparison.results import FLOOR, OURS, Run, leads, markdown, rows

LAYER = "model.language_model.layers.0.mlp."


def stored(name: str, dtype: str, numel: int, bits: int) -> Stored:
    return Stored(name=name, dtype=dtype, numel=numel, nbytes=numel * bits // 8)


SOURCE = [
    stored(f"{LAYER}experts.gate_up_proj", "BF16", 2000, 16),
    stored(f"{LAYER}experts.down_proj", "BF16", 1000, 16),
    stored(f"{LAYER}shared_expert.up_proj.weight", "BF16", 500, 16),
    stored("mtp.layers.0.mlp.experts.down_proj", "BF16", 1000, 16),
]


@pytest.mark.parametrize(
    ("output", "share"),
    [
        (SOURCE, 0.0),
        ([], 0.0),
        # packed int4 as compressed-tensors and GPTQ name it, scales beside it
        (
            [
                stored(f"{LAYER}experts.0.gate_proj.weight_packed", "I32", 375, 32),
                stored(f"{LAYER}experts.0.gate_proj.weight_scale", "BF16", 400, 16),
                stored(f"{LAYER}experts.0.gate_proj.weight_shape", "I64", 2, 64),
            ],
            1.0,
        ),
        ([stored(f"{LAYER}experts.0.down_proj.qweight", "I32", 375, 32)], 1.0),
        # torchao's stacked codes
        ([stored(f"{LAYER}experts._gate_up_proj_qdata", "F8_E4M3", 3000, 8)], 1.0),
        # one of the two stacks was forgotten
        ([stored(f"{LAYER}experts.gate_up_proj", "F8_E4M3", 2000, 8), SOURCE[1]], 2 / 3),
        # experts that are missing are not quantized
        ([stored(f"{LAYER}experts.0.up_proj.weight_packed", "U8", 75, 8)], 0.1),
        # neither the shared expert nor MTP nor zero points count
        ([stored(f"{LAYER}shared_expert.up_proj.weight", "I8", 9000, 8), *SOURCE[:2]], 0.0),
        ([stored("mtp.layers.0.mlp.experts.down_proj", "I8", 9000, 8), *SOURCE[:2]], 0.0),
        ([stored(f"{LAYER}experts.0.down_proj.qzeros", "I32", 9000, 32)], 0.0),
    ],
)
def test_experts_are_judged_by_what_holds_their_weights(output: list[Stored], share: float) -> None:
    found = experts_found(SOURCE, output)
    assert found.share == pytest.approx(share)
    assert found.quantized == (share == 1.0)
    assert str(found).startswith("yes" if share == 1 else "no" if share == 0 else f"{share:.0%}")


def test_headers_are_read_as_they_are_written(tmp_path: Path) -> None:
    save_file(
        {"a": torch.zeros(3, 5, dtype=torch.bfloat16), "b": torch.zeros(7, dtype=torch.int8)},
        tmp_path / "x.safetensors",
    )
    assert {(each.name, each.dtype, each.numel, each.nbytes) for each in stored_in(tmp_path)} == {
        ("a", "BF16", 15, 30), ("b", "I8", 7, 7),
    }  # fmt: skip


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 8 + b"{}", b"\x02" + b"\0" * 7 + b"[]xx", b"\x02" + b"\0" * 7 + b"{xxx"]
)
def test_a_broken_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.safetensors"):
        stored_in(tmp_path)


def test_a_source_without_experts_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="no routed experts"):
        experts_found(SOURCE[2:], SOURCE)


def timed(candidate: str, number: int, wall: float, cpu: float, **other: Any) -> Run:
    return Run(candidate=candidate, scheme="fp8", round=number, wall=wall, cpu=cpu, **other)


RUNS = [
    timed(OURS, 1, 8.0, 6.0, peak_rss=10), timed(OURS, 2, 4.0, 7.0, peak_rss=20),
    timed(FLOOR, 1, 2.5, 0.1), timed(FLOOR, 2, 2.0, 0.2),
    timed("quick", 1, 20.0, 60.0), timed("quick", 2, 28.0, 90.0),
    timed("frugal", 1, 40.0, 42.0), timed("frugal", 2, 41.0, 43.0),
    timed("idle", 1, 1.0, 1.0, quantized=False), timed("idle", 2, 1.0, 1.0, quantized=False),
    timed("broken", 1, 1.0, 1.0), timed("broken", 2, 0.0, 0.0, failure="a | b"),
]  # fmt: skip


def test_ratios_are_of_the_best_rounds() -> None:
    table = {row.candidate: row for row in rows(RUNS, 8_000_000_000, {OURS: [2.0, 1.0]})}
    mine = table[OURS]
    assert (mine.wall, mine.wall_median, mine.cpu, mine.peak_rss, mine.rounds) == (4.0, 6.0, 6.0, 20, 2)
    assert (mine.gigabytes_per_second, mine.to_floor, mine.to_floor_without_imports) == (2.0, 2.0, 1.5)
    assert table["quick"].to_floor == 10.0
    assert table["broken"].failure == "a | b"


def test_peers_that_failed_or_left_the_experts_are_no_measure() -> None:
    (lead,) = leads(rows(RUNS, 1, {}))
    assert (lead.wall, lead.wall_peer, lead.cpu, lead.cpu_peer) == (5.0, "quick", 7.0, "frugal")
    assert leads(rows(RUNS[:4], 1, {})) == []
    assert leads(rows(RUNS[2:], 1, {})) == []


def test_without_a_floor_there_is_no_ratio_to_it() -> None:
    assert all(row.to_floor is None for row in rows([run for run in RUNS if run.candidate != FLOOR], 1, {}))


def test_every_line_of_a_table_has_every_column() -> None:
    text = markdown(rows(RUNS, 1, {OURS: [1.0]}), {"quick": "Quick 1.0", "frugal": "Frugal 2.0"})
    lines = [line.replace("\\|", "") for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    assert "failed: a \\| b" in text
    assert "fastest peer, Quick 1.0, takes 5.0 times" in text
    assert "Frugal 2.0, 7.0 times" in text


MEASURE = """
import json, os, sys
from dataclasses import asdict
from pathlib import Path
from benchmarks.comparison.process import run
command = [sys.executable, "-c", sys.argv[1]]
print(json.dumps(asdict(run(command, env=dict(os.environ), log=Path(sys.argv[2]), timeout=60))))
"""


def test_a_process_is_measured_with_what_it_starts(tmp_path: Path) -> None:
    child = "x = bytearray(80_000_000); import time\nwhile time.process_time() < 0.5: sum(range(1_000_000))"
    parent = f"import subprocess, sys; x = bytearray(60_000_000); subprocess.run([sys.executable, '-c', {child!r}])"
    # from a small process: the kernel lets a child's peak begin with that of the process that starts it
    told = subprocess.run(
        [sys.executable, "-c", MEASURE, parent, str(tmp_path / "log")],
        cwd=Path(__file__).parents[2], check=True, capture_output=True, text=True,
    )  # fmt: skip
    taken = json.loads(told.stdout)
    assert taken["code"] == 0
    assert taken["cpu"] > 0.45
    assert taken["wall"] > 0.45
    whole_tree = Path(f"/proc/self/task/{os.getpid()}/children").exists()
    assert 140e6 * (1 if whole_tree else 0.5) < taken["peak_rss"] < 250e6


def test_a_failure_says_its_last_words(tmp_path: Path) -> None:
    def why(code: str, timeout: float = 60) -> str | None:
        return failure(run([sys.executable, "-c", code], env=dict(os.environ), log=tmp_path / "log", timeout=timeout))

    assert why("raise SystemExit('the disk is gone')") == "exit status 1: the disk is gone"
    assert why("import os; os.kill(os.getpid(), 9)") == "signal 9"
    assert "killed after" in (why("import time; time.sleep(60)", timeout=0.2) or "")


def test_the_floor_reads_and_writes_every_byte(tmp_path: Path) -> None:
    write_all(tmp_path / "a", 20_000_001)
    write_all(tmp_path / "b", 0)
    assert (tmp_path / "a").stat().st_size == 20_000_001
    assert read_all([tmp_path / "a", tmp_path / "b"]) == 20_000_001


def test_every_peer_has_a_script_and_says_when_its_environment_is_missing(tmp_path: Path) -> None:
    setup = (Path(__file__).parents[2] / "benchmarks" / "peers" / "setup.sh").read_text(encoding="utf-8")
    for peer in peers(tmp_path):
        assert Path(peer.command(tmp_path, tmp_path, peer.schemes[0])[1]).is_file()
        assert set(peer.schemes) <= set(SCHEMES)
        assert f"{peer.key}) echo " in setup
        with pytest.raises(ValueError, match=r"setup\.sh"):
            versions(peer, dict(os.environ))
    assert len(set(PEER_KEYS)) == len(PEER_KEYS)
    assert set(ours(2).schemes) == set(SCHEMES)
