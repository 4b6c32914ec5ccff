"""Saved states of another engine, transformers, are localised like those of a package; a right engine has no fault."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache
from typer.testing import CliRunner

from qconvert.cli.app import app
from qconvert.core.errors import SourceError, UsageError
from qconvert.core.metric import Verdict
from qconvert.parity.causes import CauseKind
from qconvert.parity.execution.recorded import FORMAT, save_states
from qconvert.parity.limits import bounds
from qconvert.parity.report import ParityReport
from qconvert.parity.run import ParityOptions, compare
from tests.checkpoints import make_tiny
from tests.parity.execution.engine import engine, record, without

IDS = torch.randint(400, (2, 50), generator=torch.Generator().manual_seed(3))
CALLS = (30, 1, 19)
PADDED = torch.ones_like(IDS)
PADDED[1, :20] = 0

Tamper = Callable[[Any], None]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("states")
    make_tiny(folder / "checkpoint", layers=4, naming="text", mtp=False, vision=False)
    return folder / "checkpoint"


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Any:
    return engine(checkpoint)


def compared(checkpoint: Path, tmp_path: Path, **runs: dict[str, Tensor]) -> ParityReport:
    save_states(tmp_path / "states", runs, "transformers")
    return compare(checkpoint, tmp_path / "states")


def named(report: ParityReport) -> list[tuple[CauseKind, str]]:
    return [(one.kind, one.where) for one in report.causes]


def test_a_right_engine_has_no_fault(checkpoint: Path, model: Any, tmp_path: Path) -> None:
    report = compared(
        checkpoint, tmp_path,
        whole=record(model, IDS), calls=record(model, IDS, calls=CALLS),
        padded=record(model, IDS, mask=PADDED, positions=(PADDED.cumsum(1) - 1).clamp(min=0)),
    )  # fmt: skip
    assert report.causes == () and report.verdict is Verdict.PASS
    assert all(0 < report.metric("execution_error", "as served", n).value < 1e-4 for n in range(4))
    assert report.tokens == 100 + 100 + 80


@pytest.mark.parametrize("kinds", [("mixer", "moe", "router"), ("router",), ("moe",), ("mixer", "router")])
def test_a_right_engine_that_tells_less_has_none_either(
    kinds: tuple[str, ...], checkpoint: Path, model: Any, tmp_path: Path
) -> None:
    runs = {"whole": record(model, IDS), "calls": record(model, IDS, calls=CALLS)}
    assert compared(checkpoint, tmp_path, **{n: without(run, *kinds) for n, run in runs.items()}).causes == ()


def test_a_right_engine_in_16_bits_has_none_either(checkpoint: Path, tmp_path: Path) -> None:
    narrow = engine(checkpoint, torch.bfloat16)
    runs = {"whole": record(narrow, IDS), "calls": record(narrow, IDS, calls=CALLS)}
    assert compared(checkpoint, tmp_path, **runs).causes == ()
    few = {name: without(run, "mixer", "moe", "router", "logits", "embeddings") for name, run in runs.items()}
    report = compared(checkpoint, tmp_path, **few)
    assert report.causes == ()
    # tokens were judged, if not all: of some the engine's rounding decides which experts they visit
    assert all(1e-3 < report.metric("execution_error", "as served", n).value < 0.05 for n in range(4))


def forget_memory(layer: int) -> Callable[[Any], Any]:
    def forget(cache: Any) -> Any:
        cache.layers[layer].recurrent_states[0].zero_()
        return cache

    return forget


def test_a_memory_that_is_not_carried_is_named(checkpoint: Path, model: Any, tmp_path: Path) -> None:
    run = record(model, IDS, calls=CALLS, between=forget_memory(2))
    report = compared(checkpoint, tmp_path, run=run)
    assert named(report) == [(CauseKind.STATE, "layer 2 linear attention")]
    assert "from token 30 (call 2 of 3) of row 0 on" in report.causes[0].evidence
    assert "its memory starts empty" in report.causes[0].evidence
    # hidden states alone tell as much where a known fault explains all
    few = compared(checkpoint, tmp_path, run=without(run, "mixer", "moe", "router"))
    assert named(few) == [(CauseKind.STATE, "layer 2 linear attention")]


def test_an_engine_without_a_cache_is_named(checkpoint: Path, model: Any, tmp_path: Path) -> None:
    def fresh(cache: Any) -> Any:
        return DynamicCache(config=model.config)

    report = compared(checkpoint, tmp_path, run=record(model, IDS, calls=CALLS, between=fresh))
    assert named(report) == [
        (CauseKind.STATE, "layers 0, 2 and 3 linear attention"), (CauseKind.STATE, "layer 1 attention"),
    ]  # fmt: skip
    assert "no state is carried" in report.causes[0].evidence
    assert "the cache is not carried" in report.causes[1].evidence


def test_positions_that_count_padding_or_start_over_are_named(checkpoint: Path, model: Any, tmp_path: Path) -> None:
    report = compared(checkpoint, tmp_path, run=record(model, IDS, mask=PADDED))
    # rotation is relative: a row whose tokens all are shifted is right
    assert report.causes == ()
    over = torch.cat([torch.arange(count) for count in CALLS]).expand(IDS.shape)
    report = compared(checkpoint, tmp_path, run=record(model, IDS, calls=CALLS, positions=over))
    assert named(report) == [(CauseKind.STATE, "layer 1 attention")]
    assert "positions start from 0 in each call" in report.causes[0].evidence


def no_mask(model: Any) -> dict[str, Tensor]:
    """A batch whose padding nobody told the engine of; the file does."""
    return record(model, IDS) | {"mask": PADDED}


def test_padding_that_nobody_masks_is_named_in_every_layer(checkpoint: Path, model: Any, tmp_path: Path) -> None:
    report = compared(checkpoint, tmp_path, run=no_mask(model), right=record(model, IDS))
    assert {one.kind for one in report.causes} == {CauseKind.PADDING}
    blocks = " ".join(one.where for one in report.causes)
    assert all(str(n) in blocks for n in range(4))
    assert "row 1 (padded)" in report.causes[0].evidence


def norm_without_offset(model: Any) -> None:
    model.model.layers[3].input_layernorm.weight.data -= 1


def experts_swapped(model: Any) -> None:
    experts = model.model.layers[0].mlp.experts
    experts.gate_up_proj.data = experts.gate_up_proj.data.roll(experts.gate_up_proj.shape[1] // 2, 1)


def shared_expert_silenced(model: Any) -> None:
    model.model.layers[2].mlp.shared_expert.down_proj.weight.data.zero_()


def head_is_another(model: Any) -> None:
    model.lm_head.weight.data = model.lm_head.weight.data.flip(0)


def embedding_is_scaled(model: Any) -> None:
    model.model.embed_tokens.weight.data *= 4


def weights_are_not_renormalised(model: Any) -> None:
    gate = model.model.layers[1].mlp.gate
    forward = gate.forward

    def raw(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, _, chosen = forward(hidden)
        return logits, logits.softmax(-1).gather(1, chosen), chosen

    gate.forward = raw


@pytest.mark.parametrize(
    ("tamper", "where", "words"),
    [
        (norm_without_offset, "layer 3 linear attention", "multiplies with w instead of 1 + w"),
        (experts_swapped, "layer 0 experts", "gate and up rows are taken for each other"),
        (shared_expert_silenced, "layer 2 experts", "the shared expert is missing"),
        (weights_are_not_renormalised, "layer 1 experts", "not divided by their sum"),
        (head_is_another, "output head", "the final norm or the output matrix"),
        (embedding_is_scaled, "embedding", "another table"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_an_engine_computes_otherwise_is_named(
    tamper: Tamper, where: str, words: str, dtype: torch.dtype, checkpoint: Path, tmp_path: Path
) -> None:
    tampered = engine(checkpoint, dtype)
    tamper(tampered)
    report = compared(checkpoint, tmp_path, run=record(tampered, IDS))
    assert [one.where for one in report.causes] == [where]
    assert words in report.causes[0].evidence


def test_limits_judge_the_error_of_blocks(checkpoint: Path, model: Any, tmp_path: Path) -> None:
    save_states(tmp_path / "states", {"": record(model, IDS)}, "transformers")
    strict = compare(checkpoint, tmp_path / "states", ParityOptions(limits=bounds(execution_error=1e-9)))
    assert strict.verdict is Verdict.FAIL


def test_the_command_takes_a_file_of_states(checkpoint: Path, model: Any, tmp_path: Path) -> None:
    run = record(model, IDS, calls=CALLS, between=forget_memory(0))
    save_states(tmp_path / "states.safetensors", {"": run}, "transformers")
    done = CliRunner().invoke(app, ["parity", str(checkpoint), str(tmp_path / "states.safetensors"), "--json"])
    assert done.exit_code == 1, done.output
    assert json.loads(done.stdout)["causes"][0]["kind"] == "state_not_carried"


def rewritten(path: Path, **changes: Tensor | None) -> Path:
    tensors = {name: tensor for name, tensor in load_file(path).items() if changes.get(name, tensor) is not None}
    tensors |= {name: tensor for name, tensor in changes.items() if tensor is not None}
    out = path.with_name("changed")
    save_file(tensors, out, {"format": FORMAT})
    return out


def test_bad_files_are_one_clear_error(checkpoint: Path, model: Any, tmp_path: Path) -> None:
    save_states(tmp_path / "states", {"": record(model, IDS)}, "transformers")
    path = tmp_path / "states"
    for changes, words in (
        ({"layers.2.hidden": None}, "'layers.2.hidden' is missing"),
        ({"layers.2.router": None}, "'layers.2.router' is missing"),
        ({"layers.1.moe": torch.zeros(2, 50, 7)}, "expected floats of 16 or 32 bits"),
        ({"layers.9.hidden": torch.zeros(2, 50, 96)}, "none of a model of 4 layers"),
        ({"tokens": torch.full((2, 50), 9999)}, "beyond the vocabulary of 416"),
        ({"calls": torch.tensor([20, 20])}, "does not add up to 50"),
        ({"tokens": None}, "nothing says what the states are of"),
        ({"mask": torch.ones(2, 9, dtype=torch.int64)}, "expected integers"),
    ):
        with pytest.raises(SourceError, match=words):
            compare(checkpoint, rewritten(path, **changes))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="qconvert parity CHECKPOINT STATES"):
        compare(path, checkpoint)
    with pytest.raises(UsageError, match="drop --weights-only"):
        compare(checkpoint, path, ParityOptions(layers=True))
