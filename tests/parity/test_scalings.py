"""Scaling up against down changes no output and is no fault; a scale of the wrong size still is one beside it."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qconvert.convert import convert
from qconvert.core.awq_fold import AwqFold
from qconvert.core.role import Kind, TensorRole
from qconvert.core.scheme import INT8, Scheme, int4
from qconvert.parity import tensors as comparing
from qconvert.parity.causes import CauseKind
from qconvert.parity.scalings import Scalings
from qconvert.parity.tensors import compare_weights
from qconvert.plan.policy import default_policy
from qconvert.plan.presets import preset_rules
from qconvert.sequential.calibration import Calibration
from qconvert.weights.overlay import Matrices, OverlaidWeights
from qconvert.weights.source import CheckpointWeights
from tests.checkpoints import make_tiny
from tests.sequential.test_folds import FOLDED, HALF, logits, record, uneven


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts whose units are of sizes over two orders of magnitude, so that scaling them pays."""
    folder = tmp_path_factory.mktemp("scaled") / "src"
    make_tiny(folder, mtp=False, vision=False, layout="per-expert", shards=1, layers=2)
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if "experts." in name and name.endswith("up_proj.weight"):
            tensors[name] = tensors[name] * torch.logspace(-1, 1, 64, dtype=torch.bfloat16)[:, None]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def converted(source: Path) -> Path:
    ids = torch.randint(400, (8, 32), generator=torch.Generator().manual_seed(1))
    out = source.parent / "awq"
    convert(source, out, default_policy(int4(32)), calibration=Calibration(method="awq", batches=(ids,)))
    return out


def compared(source: Path, out: Path) -> tuple[int, list[tuple[CauseKind, str]], float]:
    with CheckpointWeights.open(source) as a, CheckpointWeights.open(out, strict=False) as b:
        found = compare_weights(a, b)
    quantized = [one.sums.sqnr_db for one in found.tensors if one.scheme is not None]
    return sum(found.scaled.values()), [(one.kind, str(one)) for one in found.causes], min(quantized)


@pytest.mark.parametrize("silent", [0, 20])
def test_what_eight_bits_can_tell_is_found_also_where_a_third_of_the_rows_is_zero(
    source: Path, tmp_path: Path, silent: int
) -> None:
    """Factors within a fourteenth of an octave, far above the error of eight bits; none where none were applied."""
    for name, strength in (("plain", 0.0), ("scaled", 0.08)):
        folder = tmp_path / name
        shutil.copytree(source, folder)
        tensors = load_file(folder / "model.safetensors")
        for up in [one for one in tensors if "experts." in one and one.endswith("up_proj.weight")]:
            down = up.replace("up_proj", "down_proj")
            noise = torch.randn(len(tensors[up]), generator=torch.Generator().manual_seed(2)).clamp(-2, 2)
            factors = torch.exp2(strength * noise)
            tensors[up][:silent] = 0
            tensors[up] = (tensors[up].float() / factors[:, None]).bfloat16()
            tensors[down] = (tensors[down].float() * factors).bfloat16()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        convert(folder, tmp_path / f"{name} int8", default_policy(INT8))
    assert compared(tmp_path / "plain", tmp_path / "plain int8")[:2] == (0, [])
    found, causes, worst = compared(tmp_path / "plain", tmp_path / "scaled int8")
    assert found == 2 * 6
    assert causes == []
    assert worst > 35.0


def test_experts_that_awq_has_scaled_are_compared_as_they_work(source: Path, converted: Path) -> None:
    scaled, causes, worst = compared(source, converted)
    assert 8 <= scaled <= 2 * 6  # some are best as they are
    assert causes == []
    assert worst > 12.0


def test_nothing_else_is_taken_for_it(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "rtn", default_policy(int4(32)))
    assert compared(source, tmp_path / "rtn")[:2] == (0, [])


@pytest.mark.parametrize("part", ["up_proj", "down_proj"])
def test_a_doubled_scale_is_named_beside_it(source: Path, converted: Path, tmp_path: Path, part: str) -> None:
    for file in converted.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"model.language_model.layers.1.mlp.experts.3.{part}.weight_scale"] *= 2
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    scaled, causes, _ = compared(source, tmp_path)
    assert scaled == compared(source, converted)[0] - 1
    assert causes[0][0] is CauseKind.SCALE_FACTOR
    assert "layer 1 expert 3" in causes[0][1]


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Half of what reads the same is rounded, half keeps its bits; all folds."""
    folder = tmp_path_factory.mktemp("folded")
    uneven(folder / "src", torch.bfloat16)
    convert(folder / "src", folder / "out", HALF, calibration=FOLDED)
    return folder / "src", folder / "out"


def test_a_folded_checkpoint_has_no_fault(folded: tuple[Path, Path]) -> None:
    with CheckpointWeights.open(folded[0]) as a, CheckpointWeights.open(folded[1], strict=False) as b:
        found = compare_weights(a, b)
    assert found.causes == ()
    assert list(found.scaled) == list(AwqFold)
    said = record(folded[1])
    for fold in (AwqFold.POST_ATTENTION, AwqFold.INPUT, AwqFold.LINEAR_NORM):
        assert found.scaled[fold] == said[fold.value]["scaled"] > 0
    assert 0 < found.scaled[AwqFold.VALUE] <= said["value"]["scaled"]
    for one in found.tensors:
        assert one.sums.sqnr_db > (10.0 if one.scheme is not None else 48.0), one.name
        for half in one.halves:
            assert half.sums.sqnr_db > 10.0


@pytest.mark.parametrize(
    ("fold", "experts"),
    [*((fold, int4(32)) for fold in AwqFold), (AwqFold.UP_DOWN, INT8)],
    ids=lambda value: str(getattr(value, "value", value)),
)
def test_each_fold_alone_has_no_fault_beside_eight_bits(
    folded: tuple[Path, Path], tmp_path: Path, fold: AwqFold, experts: Scheme
) -> None:
    """Scales of eight bits cut off what few inputs count: some rows exceed plain rounding by 12 dB."""
    policy = default_policy(experts, rules=preset_rules("mixed", experts))
    convert(folded[0], tmp_path / "out", policy, calibration=replace(FOLDED, folds=(fold,)))
    with CheckpointWeights.open(folded[0]) as a, CheckpointWeights.open(tmp_path / "out", strict=False) as b:
        found = compare_weights(a, b)
    assert found.causes == ()
    assert set(found.scaled) == {fold}


def test_numbers_follow_neither_threads_nor_memory(folded: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    before, found = torch.get_num_threads(), []
    try:
        for threads, room in ((1, 1 << 40), (2, 1 << 40), (5, 1 << 40), (3, 1)):
            torch.set_num_threads(threads)
            monkeypatch.setattr(comparing, "available_bytes", lambda room=room: room)
            with CheckpointWeights.open(folded[0]) as a, CheckpointWeights.open(folded[1], strict=False) as b:
                found.append(compare_weights(a, b))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert len(found[0].tensors) > 100
    assert all(one == found[0] for one in found)


def damaged(
    folded: tuple[Path, Path], to: Path, change: Callable[[dict[str, Tensor], dict[str, Tensor]], None]
) -> Path:
    for file in folded[1].iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    tensors = load_file(to / "model.safetensors")
    change(tensors, load_file(folded[0] / "model.safetensors"))
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to


AT = "model.language_model.layers.0."


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("mlp.gate.weight", CauseKind.CHANGED),
        ("linear_attn.in_proj_a.weight", CauseKind.CHANGED),
        ("mlp.shared_expert_gate.weight", CauseKind.CHANGED),
    ],
)
def test_a_reader_that_nobody_has_told_is_named(
    folded: tuple[Path, Path], tmp_path: Path, name: str, kind: CauseKind
) -> None:
    def forget(tensors: dict[str, Tensor], original: dict[str, Tensor]) -> None:
        tensors[AT + name] = original[AT + name]

    _, causes, _ = compared(folded[0], damaged(folded, tmp_path, forget))
    assert [one[0] for one in causes] == [kind]
    assert name.rpartition(".")[0].rpartition(".")[2].split("_")[-1] in causes[0][1] or "router" in causes[0][1]


def test_a_doubled_scale_of_a_folded_matrix_is_named(folded: tuple[Path, Path], tmp_path: Path) -> None:
    def double(tensors: dict[str, Tensor], original: dict[str, Tensor]) -> None:
        tensors[AT + "linear_attn.in_proj_qkv.weight_scale"][3] *= 2

    _, causes, _ = compared(folded[0], damaged(folded, tmp_path, double))
    assert causes[0][0] is CauseKind.SCALE_FACTOR
    assert "linear_attention.qkv" in causes[0][1]


def test_a_norm_that_is_stored_as_one_more_is_no_fold(folded: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = folded[0], tmp_path / "out"
    convert(source, out, default_policy(int4(32)))

    def add(tensors: dict[str, Tensor], original: dict[str, Tensor]) -> None:
        tensors[AT + "input_layernorm.weight"] += 1

    (tmp_path / "one").mkdir()
    _, causes, _ = compared(source, damaged((source, out), tmp_path / "one", add))
    assert [one[0] for one in causes] == [CauseKind.OFFSET_NORM]


def test_the_original_fits_into_what_is_folded(folded: tuple[Path, Path]) -> None:
    """With everything put back a folded model is the original, with a part of it nearer to it than it was."""

    def error(chosen: Callable[[TensorRole], bool], over: Matrices) -> float:
        found = logits(OverlaidWeights(base=b, over=over, chosen=chosen), a)
        return float((found - right).norm() / right.norm())

    with CheckpointWeights.open(folded[0]) as a, CheckpointWeights.open(folded[1]) as b:
        right, fits = logits(a, a), Scalings(a, b).original_scaled
        assert error(lambda role: True, fits) < 1e-4
        before = error(lambda role: False, fits)
        assert error(of_linear_attention, fits) < 0.9 * before < before < error(of_linear_attention, a)


def of_linear_attention(role: TensorRole) -> bool:
    return role.kind in (Kind.LINEAR_QKV, Kind.LINEAR_OUTPUT)


def test_threads_that_read_at_once_read_what_one_would(source: Path, converted: Path) -> None:
    before = sys.getswitchinterval()
    with CheckpointWeights.open(source) as a, CheckpointWeights.open(converted, strict=False) as b:
        roles = [role for role in a.stored if role.kind in (Kind.EXPERT_UP, Kind.EXPERT_DOWN)]
        expected = list(map(Scalings(a, b).original_scaled.matrix, roles))
        sys.setswitchinterval(1e-6)
        try:
            for _ in range(5):
                view = Scalings(a, b).original_scaled
                with ThreadPoolExecutor(8) as pool:
                    found = list(pool.map(view.matrix, roles))
                assert all(map(torch.equal, found, expected))
        finally:
            sys.setswitchinterval(before)
