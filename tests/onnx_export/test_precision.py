"""Weights in 16 bits on a CPU: packages that load, half the size, with the reference's logits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qconvert.core.errors import UsageError
from qconvert.core.scheme import int4
from qconvert.onnx_export.operator_sets import OPERATOR_SETS
from qconvert.onnx_export.plan import PackageOptions
from qconvert.onnx_export.runtime import Package
from qconvert.plan.policy import default_policy
from reference_model.draft import draft_tokens
from reference_model.model import CausalLM
from tests.checkpoints import make_tiny
from tests.onnx_export.packages import EXACT, Ids, error, exported, in_pieces, prompt, reference
from tests.tolerances import tolerances

LIMITS = tolerances("onnx_export")
PIECES = (20, 1, 1, 50)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CausalLM]:
    folder = tmp_path_factory.mktemp("source")
    make_tiny(folder / "source", layers=4, layout="per-expert")
    return folder / "source", reference(folder / "source")


def small(folder: Path, ops: str, dtype: str, out: Path) -> Package:
    return exported(folder, out, replace(EXACT, ops=ops, dtype=dtype))


@pytest.mark.parametrize("ops", [one.name for one in OPERATOR_SETS])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_of_16_bits_give_the_references_logits(
    source: tuple[Path, CausalLM], ops: str, dtype: str, tmp_path: Path
) -> None:
    folder, model = source
    package = small(folder, ops, dtype, tmp_path / "package")
    ids, expected = prompt(model, 3, 130)
    # the source is BF16, which both hold; cached keys and values are rounded to float16, and never to bfloat16
    limit = LIMITS["fp16_cache_logits"] if dtype == "float16" else LIMITS["fp32_logits"]
    assert error(package.forward(ids).logits, expected) < LIMITS["fp32_logits"]
    assert error(in_pieces(package, ids, list(PIECES)), expected) < limit


def test_padding_changes_no_row_where_keys_are_cached_in_float16(source: tuple[Path, CausalLM], tmp_path: Path) -> None:
    folder, model = source
    package = small(folder, "contrib", "float16", tmp_path / "package")
    ids, _ = prompt(model, 2, 40)
    mask = np.ones_like(ids)
    mask[0, :9] = 0
    mask[1, -7:] = 0
    rows = in_pieces(package, ids, [15, 2], mask)
    for row, real in enumerate(mask.astype(bool)):
        alone = package.forward(ids[row : row + 1, real]).logits[0]
        assert error(rows[row, real], alone) < LIMITS["fp16_cache_logits"]


def test_keys_and_values_are_float16_and_memories_float32(source: tuple[Path, CausalLM], tmp_path: Path) -> None:
    package = small(source[0], "contrib", "float16", tmp_path / "package")
    states = package.forward(np.array([[1, 2, 3]])).cache.states
    assert {name: str(state.dtype) for name, state in states.items()} == {
        name: "float16" if name.endswith((".key", ".value")) else "float32" for name in states
    }


def test_the_prediction_head_drafts_from_float16(source: tuple[Path, CausalLM], tmp_path: Path) -> None:
    folder, model = source
    package = small(folder, "contrib", "float16", tmp_path / "package")
    ids, _ = prompt(model, 1, 40)
    expected = _drafted(model, ids)
    hidden = package.forward(ids).hidden
    assert hidden is not None
    first = package.draft(hidden[:, :20], ids[:, 1:21])
    second = package.draft(hidden[:, 20:-1], ids[:, 21:], cache=first.cache)
    assert error(np.concatenate((first.logits, second.logits), axis=1)[:, -1:], expected) < LIMITS["fp16_cache_logits"]


def _drafted(model: CausalLM, ids: Ids) -> np.ndarray:
    import torch

    with torch.no_grad():
        tokens = torch.from_numpy(ids)
        return draft_tokens(model, model(tokens).hidden[:, :-1], tokens[:, 1:], 1).logits.numpy()[:, -1:]


def test_dense_weights_take_half_the_bytes_and_codes_keep_their_scales(
    source: tuple[Path, CausalLM], tmp_path: Path
) -> None:
    rounds = replace(EXACT, policy=default_policy(int4(32), search=False, rules=()), vision=False)
    sizes = {}
    for dtype in ("float32", "float16"):
        out = tmp_path / dtype
        exported(source[0], out, replace(rounds, dtype=dtype))
        sizes[dtype] = (out / "model.safetensors").stat().st_size
    assert sizes["float16"] < 0.75 * sizes["float32"]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"ep": "tpu"}, "execution provider 'tpu'"),
        ({"dtype": "float8"}, "element type 'float8'"),
        ({"ep": "cuda", "dtype": "float32"}, "no float32 kernel"),
        ({"ep": "cuda", "ops": "standard"}, "'contrib', not in 'standard'"),
        ({"embedding": "fp8"}, "cannot be rounded to 'fp8'"),
    ],
)
def test_what_there_is_not_is_refused_by_name(wrong: dict[str, str], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        PackageOptions(**wrong)


def test_a_manifest_gives_the_options_back() -> None:
    options = PackageOptions(ep="cuda", embedding="int8", allow_scale_rounding=True)
    again = PackageOptions.of_entry(options.entry, None)
    assert (again.precision, again.embedding, again.allow_scale_rounding) == (options.precision, "int8", True)
