"""Scores are those of `parity`, gains and peers are compared on the same tokens, and reasons are printed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from benchmarks.comparison.experts import Sizes, Stored, sizes
from benchmarks.comparison.methods import Text, our_methods, peer_methods
from benchmarks.quality.score import ExpertsBetween, changed, rounded_experts, scored_logits
from benchmarks.quality.table import markdown, rows
from qconvert.convert import convert
from qconvert.core.scheme import int4
from qconvert.parity.logits import score
from qconvert.parity.model import compare_models
from qconvert.plan.policy import default_policy
from qconvert.weights.source import CheckpointWeights
from tests.checkpoints import make_tiny

ROOT = Path(__file__).parents[2]
POSITIONS = 4096


def stored(name: str, dtype: str, numel: int, nbytes: int) -> Stored:
    return Stored(name=name, dtype=dtype, numel=numel, nbytes=nbytes)


def test_sizes_leave_out_what_peers_drop() -> None:
    source = [
        stored("model.layers.0.mlp.experts.down_proj", "BF16", 1000, 2000),
        stored("mtp.layers.0.mlp.experts.down_proj", "BF16", 1000, 2000),
    ]
    output = [
        stored("model.layers.0.mlp.experts.0.down_proj.weight_packed", "I32", 125, 500),
        stored("model.layers.0.mlp.experts.0.down_proj.weight_scale", "BF16", 8, 16),
        stored("model.layers.0.mlp.shared_expert.down_proj.weight", "BF16", 50, 100),
        stored("mtp.layers.0.mlp.experts.down_proj", "BF16", 1000, 2000),
        stored("model.visual.merger.norm.weight", "BF16", 4, 8),
    ]
    assert sizes(source, output) == Sizes(bytes=2624, text_bytes=616, expert_bits=8 * 516 / 1000)
    with pytest.raises(ValueError, match="no routed experts"):
        sizes(source[1:], output)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("quality")
    make_tiny(folder / "src")
    convert(folder / "src", folder / "int4", default_policy(int4(32)))
    return folder / "src", folder / "int4"


def test_scores_are_those_of_parity(folders: tuple[Path, Path]) -> None:
    ids = [torch.randint(416, shape, generator=torch.Generator().manual_seed(0)) for shape in ((3, 20), (1, 7))]
    with CheckpointWeights.open(folders[0]) as original, CheckpointWeights.open(folders[1]) as output:
        expected = compare_models(original, output, ids).plain.scores
        ours = scored_logits(original, original, ids)
        assert len(ours) == 3 * 19 + 6
        found = score(ours, scored_logits(output, output, ids), torch.cat([part[:, 1:].flatten() for part in ids]))
    for name in ("kl", "nll_original", "nll_converted"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-3, atol=1e-6)


def test_what_an_output_changes_besides_is_named_and_told_apart(folders: tuple[Path, Path]) -> None:
    ids = [torch.arange(40)[None]]
    (weights,) = folders[1].glob("*.safetensors")
    tensors = load_file(weights)
    norm = next(name for name in tensors if name.endswith("layers.1.input_layernorm.weight"))
    with CheckpointWeights.open(folders[0]) as original, CheckpointWeights.open(folders[1]) as output:
        assert changed(original, output) == []
        assert rounded_experts(output) and not rounded_experts(original)
        alone = scored_logits(output, output, ids)
    other = folders[1].with_name("other")
    other.mkdir()
    save_file({**tensors, norm: tensors[norm] + 0.5}, other / weights.name)
    (other / "config.json").write_bytes((folders[1] / "config.json").read_bytes())
    with CheckpointWeights.open(folders[0]) as original, CheckpointWeights.open(other) as output:
        assert changed(original, output) == ["layers.1.input_layernorm.weight"]
        assert not torch.equal(scored_logits(output, output, ids), alone)
        assert torch.equal(scored_logits(original, ExpertsBetween(output, original), ids), alone)


def measured(key: str, scheme: str = "int4-g128", text_bytes: int = 1000, **other: Any) -> dict[str, Any]:
    return {
        "key": key, "scheme": scheme, "title": f"the {key}", "ours": key in ("rtn", "gptq"), "text_bytes": text_bytes,
        "bytes": 2000, "expert_bits": 4.125, "experts": "yes (I32)", "changed": 0, "cpu": 1.0, "peak_rss": 1,
        "failure": None, **other,
    }  # fmt: skip


def scores(kl: NDArray[np.float64], **other: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    return {"kl": kl, "nll_original": np.full(len(kl), 2.0), "nll_converted": np.full(len(kl), 2.25), **other}


HARD = np.random.default_rng(0).lognormal(-7, 2, POSITIONS)
"""Positions differ by orders of magnitude: unpaired, a tenth more or less is nothing."""


def test_shares_and_ratios_are_paired() -> None:
    table = rows(
        [measured("rtn"), measured("gptq"), measured("peer")],
        {("rtn", "int4-g128"): scores(HARD), ("gptq", "int4-g128"): scores(0.6 * HARD),
         ("peer", "int4-g128"): scores(0.5 * HARD)},
        "rtn", "gptq",
    )  # fmt: skip
    rtn, gptq, peer = table
    assert rtn.kl is not None and rtn.kl.low < 0.9 * rtn.kl.value and rtn.kl.high > 1.1 * rtn.kl.value
    assert (rtn.median, gptq.median) == (np.median(HARD), np.median(0.6 * HARD))
    assert rtn.recovered is None and rtn.to_ours is None and gptq.to_ours is None
    assert gptq.recovered is not None and peer.to_ours is not None
    for interval, value in ((gptq.recovered, 0.4), (peer.to_ours, 0.5 / 0.6)):
        assert (interval.value, interval.low, interval.high) == pytest.approx((value, value, value))
    assert gptq.perplexity is not None and gptq.perplexity.value == pytest.approx(np.exp(0.25))
    assert peer.lower_than_ours and not gptq.lower_than_ours


def test_other_folds_are_held_against_the_default_ones_of_their_scheme() -> None:
    usual, other, alone = rows(
        [measured("awq", ours=True), measured("awq-input", ours=True), measured("awq-input", "int8", ours=True)],
        {("awq", "int4-g128"): scores(HARD), ("awq-input", "int4-g128"): scores(0.9 * HARD),
         ("awq-input", "int8"): scores(HARD)},
        "rtn", "gptq",
    )  # fmt: skip
    assert usual.to_usual is None and alone.to_usual is None
    assert other.to_usual is not None and other.to_usual.high == pytest.approx(0.9)


@pytest.mark.parametrize(("text_bytes", "rival"), [(999, 1.0), (1500, 0.5), (900, None)])
def test_a_peer_is_held_against_the_largest_that_is_not_larger(text_bytes: int, rival: float | None) -> None:
    table = rows(
        [measured("gptq"), measured("gptq", "int8", 1400), measured("peer", "nf4", text_bytes)],
        {("gptq", "int4-g128"): scores(HARD), ("gptq", "int8"): scores(0.5 * HARD), ("peer", "nf4"): scores(HARD)},
        "rtn", "gptq",
    )  # fmt: skip
    found = table[-1].to_ours
    assert (found is None) if rival is None else (found is not None and found.value == pytest.approx(1 / rival))


def test_scores_of_other_tokens_are_refused() -> None:
    given = {("rtn", "int8"): scores(HARD), ("gptq", "int8"): scores(HARD[1:])}
    with pytest.raises(ValueError, match="same tokens"):
        rows([measured("rtn", "int8"), measured("gptq", "int8")], given, "rtn", "gptq")


def test_the_table_tells_what_did_not_run_and_what_else_was_changed() -> None:
    given = [
        measured("rtn"), measured("peer", changed=9), measured("lone", changed=35, experts="no (BF16)"),
        measured("absent", failure="no kernel"),
    ]  # fmt: skip
    found = {("rtn", "int4-g128"): scores(HARD), ("peer", "int4-g128"): scores(HARD, kl_experts=0.5 * HARD),
             ("lone", "int4-g128"): scores(HARD)}  # fmt: skip
    text = markdown(rows(given, found, "rtn", "gptq"))
    lines = text.splitlines()
    cells = {line.count(" | ") for line in lines if line.startswith("|")}
    assert len(cells) == 1 and sum(line.startswith("| the ") for line in lines) == 3
    assert "- the absent does not run: no kernel" in lines
    assert f"changes 9 other tensors of the text decoder; its experts alone: KL {500 * HARD.mean():.3f} " in text
    assert "changes 35 other tensors of the text decoder; routed experts quantized: no (BF16)" in text


def test_everybody_looks_at_the_same_text() -> None:
    text = Text(ids=Path("ids.npy"), options=("--tokens", "512"))
    ours = {one.key: one.commands(Path("src"), Path("out"), "int4-g32") for one in our_methods(2, text)}
    assert all("--group 32" in " ".join(commands[-1]) for commands in ours.values())
    for key in ("gptq", "awq"):
        (command,) = ours[key]
        assert command[command.index("--calibration-tokens") + 1] == "512"
    read, quantized = ours["imatrix"]
    assert read[1] == "calibrate" and read[read.index("--tokens") + 1] == "512"
    assert read[read.index("-o") + 1] == quantized[quantized.index("--stats") + 1]
    for peer in peer_methods(Path("peers"), text, Path("held-out.npz")):
        (command,) = peer.commands(Path("src"), Path("out"), peer.schemes[0])
        assert command[-1] == ("held-out.npz" if peer.logits else "ids.npy")
        assert Path(command[1]).is_file()


def test_a_peer_without_an_environment_is_told_and_is_no_failure(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/bench_quality.py", str(tmp_path / "work"), "--only", "torchao"]
    command += ["--calibration-tokens", "512", "--tokens", "100", "--peer-folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.count("- torchao does not run: no environment at ") == 2
    with np.load(tmp_path / "work" / "held-out.npz") as held_out:
        assert held_out["lengths"].sum() == len(held_out["ids"]) == 100
    command[command.index("100")] = "200"
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 1 and "results on other tokens" in done.stderr
