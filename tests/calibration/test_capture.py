"""Statistics are what hooks on the whole model see, and their bytes depend on nothing but checkpoint and windows."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from calibration import capture as capture_module
from calibration.capture import capture
from calibration.data import CalibrationWindows, calibration_windows
from calibration.sites import site_of
from calibration.statistics import DOCUMENT, PRIOR_TOKENS, Statistics
from qconvert.core.errors import DataError, Interrupted, OutputError, SourceError, UsageError
from qconvert.core.role import Kind, Section, TensorRole
from qconvert.io.checkpoint import Checkpoint
from qconvert.texts.documents import Text
from qconvert.weights.source import CheckpointWeights
from reference_model.load import load_weights
from reference_model.model import CausalLM
from reference_model.moe import Visits
from tests.checkpoints import make_tiny
from tests.test_convert import digest

MEMORY = 64 << 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    make_tiny(folder, experts=24, dtype=torch.float32)
    return folder


@pytest.fixture(scope="module")
def windows(model: Path) -> CalibrationWindows:
    ids = np.random.default_rng(0).integers(0, 400, 200)
    np.save(model.parent / "ids.npy", ids)
    found = calibration_windows(
        model, 416, texts=[Text.parse(str(model.parent / "ids.npy"))], tokens=60, window=12, seed=0
    )
    batches = (found.batches[0][:2], found.batches[0][2:4], found.batches[0][4:])
    return CalibrationWindows(batches=batches, record=found.record)


@pytest.fixture(scope="module")
def stats(model: Path, windows: CalibrationWindows, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stats") / "stats"
    capture(model, out, windows, memory=MEMORY)
    return out


@pytest.fixture(scope="module")
def seen(model: Path, windows: CalibrationWindows) -> dict[str, list[Tensor]]:
    """Inputs of every linear module of the whole model by name, of experts by their own."""
    found: dict[str, list[Tensor]] = defaultdict(list)
    with CheckpointWeights.open(model) as weights:
        whole = CausalLM(weights.config.text)
        load_weights(whole, weights, torch.float32, skip=("visual.",))

    def linear(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        return lambda module, args: found[name].append(args[0].flatten(0, -2))

    def experts(name: str) -> Callable[[nn.Module, tuple[Tensor, Visits]], None]:
        def see(module: nn.Module, args: tuple[Tensor, Visits]) -> None:
            x, visits = args
            for e in range(24):
                rows = x[(visits.experts == e).any(-1)]
                gate, up = (rows @ module.gate_up_proj[e].T).chunk(2, -1)  # type: ignore[operator, index]
                found[f"{name}.{e}.gate_up_proj"].append(rows)
                found[f"{name}.{e}.down_proj"].append(functional.silu(gate) * up)
            found[f"{name}.visits"].append(visits.experts)

        return see

    for name, module in whole.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(linear(name))
        elif name.endswith(".experts"):
            module.register_forward_pre_hook(experts(name))
    with torch.no_grad():
        for ids in windows.batches:
            out = whole(ids)
            found["lm_head"].append(out.hidden.flatten(0, 1))
            whole.draft(out.hidden[:, :-1], ids[:, 1:])
    return found


ROLES = [
    (Section.TEXT, Kind.LINEAR_QKV, 0, "layers.0.linear_attn.in_proj_qkv"),
    (Section.TEXT, Kind.LINEAR_Z, 2, "layers.2.linear_attn.in_proj_z"),
    (Section.TEXT, Kind.LINEAR_A, 2, "layers.2.linear_attn.in_proj_a"),
    (Section.TEXT, Kind.LINEAR_OUTPUT, 2, "layers.2.linear_attn.out_proj"),
    (Section.TEXT, Kind.ATTENTION_QUERY, 1, "layers.1.self_attn.q_proj"),
    (Section.TEXT, Kind.ATTENTION_VALUE, 1, "layers.1.self_attn.v_proj"),
    (Section.TEXT, Kind.ATTENTION_OUTPUT, 1, "layers.1.self_attn.o_proj"),
    (Section.TEXT, Kind.SHARED_UP, 1, "layers.1.mlp.shared_expert.up_proj"),
    (Section.TEXT, Kind.SHARED_DOWN, 0, "layers.0.mlp.shared_expert.down_proj"),
    (Section.TEXT, Kind.HEAD, None, "lm_head"),
    (Section.MTP, Kind.MTP_FC, None, "mtp.fc"),
    (Section.MTP, Kind.ATTENTION_KEY, 0, "mtp.layers.0.self_attn.k_proj"),
    (Section.MTP, Kind.SHARED_DOWN, 0, "mtp.layers.0.mlp.shared_expert.down_proj"),
]


def agrees(found: Statistics, role: TensorRole, x: Tensor) -> None:
    wide = x.double()
    assert found.tokens(role) == len(x)
    expected = {
        "mean_squares": wide.square().mean(0) if len(x) else torch.zeros(x.shape[1]),
        "mean_abs": wide.abs().mean(0) if len(x) else torch.zeros(x.shape[1]),
        "max_abs": wide.abs().amax(0) if len(x) else torch.zeros(x.shape[1]),
    }
    for name, values in expected.items():
        torch.testing.assert_close(
            getattr(found, name)(role).double(), values.double(), rtol=1e-4, atol=1e-7, msg=f"{name} of {role}"
        )


@pytest.mark.parametrize(("section", "kind", "layer", "module"), ROLES)
def test_statistics_are_what_hooks_on_the_whole_model_see(
    section: Section, kind: Kind, layer: int | None, module: str, stats: Path, seen: dict[str, list[Tensor]]
) -> None:
    with Statistics.open(stats) as found:
        agrees(found, TensorRole(section=section, kind=kind, layer=layer), torch.cat(seen[module]))


@pytest.mark.parametrize(("section", "layer"), [(Section.TEXT, 0), (Section.TEXT, 1), (Section.MTP, 0)])
def test_so_are_those_of_every_expert(section: Section, layer: int, stats: Path, seen: dict[str, list[Tensor]]) -> None:
    prefix = f"{'mtp.' if section is Section.MTP else ''}layers.{layer}.mlp.experts"
    with Statistics.open(stats) as found:
        for e in range(24):
            for kind, part in (
                (Kind.EXPERT_GATE, "gate_up_proj"),
                (Kind.EXPERT_UP, "gate_up_proj"),
                (Kind.EXPERT_DOWN, "down_proj"),
            ):
                role = TensorRole(section=section, kind=kind, layer=layer, expert=e)
                agrees(found, role, torch.cat(seen[f"{prefix}.{e}.{part}"]))
        visits = torch.cat(seen[f"{prefix}.visits"])
        pairs = torch.zeros(24, 24, dtype=torch.int64)
        for row in visits.tolist():
            for a in row:
                for b in row:
                    pairs[a, b] += 1
        assert torch.equal(found.co_visits(section, layer), pairs)
        got = next(one for one in found.layers() if (one.section, one.layer) == (section, layer))
        assert torch.equal(got.tokens, pairs.diagonal())


def test_every_matrix_of_the_decoder_is_looked_at(model: Path, stats: Path) -> None:
    with CheckpointWeights.open(model) as weights, Statistics.open(stats) as found:
        roles = [role for role in weights.stored if site_of(role) is not None]
        assert all(found.has(role) for role in roles)
        linear = {module for _, kind, _, module in ROLES}
        assert len({site_of(role) for role in roles}) >= len(linear)
        assert not any(found.has(role) for role in weights.stored if role.section is Section.VISION)


def test_an_expert_without_tokens_has_the_layers_inputs_for_gate_and_ones_for_down(stats: Path) -> None:
    with Statistics.open(stats) as found:
        layer = next(one for one in found.layers() if not bool(one.tokens.all()))
        nobody, somebody = int(layer.tokens.argmin()), int(layer.tokens.argmax())

        def role(kind: Kind, expert: int) -> TensorRole:
            return TensorRole(section=layer.section, kind=kind, layer=layer.layer, expert=expert)

        weights = layer.tokens / layer.tokens.sum()
        squares = torch.stack([found.mean_squares(role(Kind.EXPERT_GATE, e)) for e in range(24)])
        pooled = weights @ squares
        torch.testing.assert_close(found.importance(role(Kind.EXPERT_UP, nobody)), pooled, rtol=1e-5, atol=1e-9)
        assert torch.equal(found.importance(role(Kind.EXPERT_DOWN, nobody)), torch.ones(64))
        tokens = int(layer.tokens[somebody])
        own = (tokens * squares[somebody] + PRIOR_TOKENS * pooled) / (tokens + PRIOR_TOKENS)
        torch.testing.assert_close(found.importance(role(Kind.EXPERT_GATE, somebody)), own, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("options", [{"jobs": 2}, {"jobs": 3, "memory": 1 << 10}, {"memory": 1 << 12}])
def test_the_bytes_depend_neither_on_jobs_nor_on_memory(
    options: dict[str, int], model: Path, windows: CalibrationWindows, stats: Path, tmp_path: Path
) -> None:
    capture(model, tmp_path / "again", windows, **{"memory": MEMORY, **options})
    assert digest(tmp_path / "again") == digest(stats)


@pytest.mark.parametrize("stop", [1, 4, 8, 10, 12])
def test_a_run_that_was_interrupted_goes_on_to_the_same_bytes(
    stop: int, model: Path, windows: CalibrationWindows, stats: Path, tmp_path: Path
) -> None:
    told: list[int] = []

    def interrupt(phase: str, done: int, total: int) -> None:
        told.append(done)
        if len(told) == stop:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    expected = KeyboardInterrupt if stop <= 3 else Interrupted
    with pytest.raises(expected):
        capture(model, out, windows, memory=MEMORY, progress=interrupt)
    assert not out.exists()
    capture(model, out, windows, memory=MEMORY, progress=lambda phase, done, total: told.append(done))
    assert digest(out) == digest(stats)
    assert told[stop] == 1 + (stop - 1) // 3 * 3, "from the layer on that it was in"
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing else is left"


def test_work_of_other_windows_is_refused_and_fresh_starts_over(
    model: Path, windows: CalibrationWindows, stats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise OutputError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OutputError, match="disk full\nWhat is finished"):
        patch.setattr(capture_module, "finish", fail)
        capture(model, tmp_path / "out", windows, memory=MEMORY)
    other = CalibrationWindows(batches=windows.batches, record={**windows.record, "seed": 9})
    with pytest.raises(UsageError, match="--fresh starts over"):
        capture(model, tmp_path / "out", other, memory=MEMORY)
    capture(model, tmp_path / "out", windows, memory=MEMORY, fresh=True)
    assert digest(tmp_path / "out") == digest(stats)


def test_inputs_that_are_not_finite_are_named(model: Path, windows: CalibrationWindows, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    copy.mkdir()
    for path in model.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    for path in copy.glob("*.safetensors"):
        tensors = load_file(path)
        name = "model.language_model.layers.1.input_layernorm.weight"
        if name in tensors:
            tensors[name][3] = torch.nan
            save_file(tensors, path, {"format": "pt"})
    with pytest.raises(DataError, match=r"layers\.1\.self_attn\.q_proj: inputs hold NaN"):
        capture(copy, tmp_path / "out", windows, memory=MEMORY)
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_statistics_of_another_checkpoint_are_refused(model: Path, stats: Path, tmp_path: Path) -> None:
    with Checkpoint.open(model) as checkpoint:
        Statistics.open(stats, checkpoint).close()
    make_tiny(tmp_path / "other", experts=24, dtype=torch.float32, seed=1)
    with (
        Checkpoint.open(tmp_path / "other") as checkpoint,
        pytest.raises(UsageError, match=r"made of another checkpoint.* run `qconvert calibrate"),
    ):
        Statistics.open(stats, checkpoint)


def test_the_same_weights_in_other_files_are_the_same_checkpoint(stats: Path, tmp_path: Path) -> None:
    make_tiny(tmp_path / "again", experts=24, dtype=torch.float32, shards=4)
    with Checkpoint.open(tmp_path / "again") as checkpoint:
        Statistics.open(stats, checkpoint).close()


def damaged(stats: Path, folder: Path, change: Callable[[Path], None]) -> Path:
    folder.mkdir()
    for path in stats.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    change(folder)
    return folder


def cut(folder: Path) -> None:
    path = folder / "layer-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def flip(folder: Path) -> None:
    path = folder / "layer-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)


def other_schema(folder: Path) -> None:
    path = folder / DOCUMENT
    path.write_text(path.read_text().replace("statistics/1", "statistics/7"))


def without_document(folder: Path) -> None:
    (folder / DOCUMENT).unlink()


def cut_document(folder: Path) -> None:
    path = folder / DOCUMENT
    path.write_bytes(path.read_bytes()[:-30])


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """A file with other numbers, listed as if it belonged there."""
    path = folder / "layer-00001.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    document = json.loads((folder / DOCUMENT).read_text())
    capture_module._describe(folder, {k: v for k, v in document.items() if k != "files"}, list(document["files"]))


def nan(folder: Path) -> None:
    rewritten(folder, lambda tensors: tensors["layers.1.self_attn.q_proj.mean_square"].fill_(torch.nan))


def misshapen(folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["layers.1.self_attn.q_proj.mean_square"] = torch.ones(5)

    rewritten(folder, change)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (cut, "layer-00001"),
        (flip, "not what statistics.json lists"),
        (other_schema, "its schema is 'qconvert-statistics/7', expected"),
        (without_document, "expected the output of `qconvert calibrate`"),
        (cut_document, "not JSON"),
        (nan, r"layers\.1\.self_attn\.q_proj\.mean_square has NaN"),
        (misshapen, r"the tensors of layers\.1\.self_attn\.q_proj do not belong together"),
    ],
)
def test_damaged_statistics_are_one_clear_error(
    change: Callable[[Path], None], says: str, stats: Path, tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match=says):
        Statistics.open(damaged(stats, tmp_path / "stats", change))
