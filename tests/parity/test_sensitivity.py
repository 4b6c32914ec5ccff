"""What a part costs alone is a conversion of that part alone, and such costs add up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qconvert.cli.demo import CHECKPOINT
from qconvert.convert import convert
from qconvert.core.role import Kind, Section, TensorRole
from qconvert.core.scheme import FP8, NVFP4, Scheme, int4
from qconvert.parity.kept_states import StateFolder
from qconvert.parity.model import compare_models
from qconvert.parity.sensitivity import own_states, pieces_of, roundable, sensitivities
from qconvert.parity.windows import choose_windows
from qconvert.plan.policy import Rule, default_policy
from qconvert.weights.source import CheckpointWeights
from reference_model.load import MemoryStore
from tests.checkpoints import make_tiny
from tests.parity.test_model import BATCHES
from tests.tolerances import tolerances

LIMITS = tolerances("parity")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sensitivity") / "original"
    make_tiny(folder)
    return folder


@pytest.mark.parametrize("scheme", [int4(32), FP8], ids=str)
def test_a_part_alone_is_a_conversion_of_that_part_alone(scheme: Scheme, original: Path, tmp_path: Path) -> None:
    rules = (
        Rule(match="text.linear_attention.output", layers=frozenset({2}), scheme=scheme, reason="a test"),
        Rule(match="text.expert.*", scheme=None, reason="a test"),
    )
    convert(original, tmp_path / "out", default_policy(scheme, rules=rules), jobs=1, max_memory=4 << 30)
    with CheckpointWeights.open(original) as source, CheckpointWeights.open(tmp_path / "out") as other:
        states = own_states(source, BATCHES, StateFolder(folder=tmp_path / "states"))
        pieces = [
            piece
            for piece in pieces_of(source, roundable(source), [scheme])
            if (piece.group, piece.layer) == ("linear attention output", 2)
        ]
        (found,) = sensitivities(source, BATCHES, states, pieces, MemoryStore())
        whole = compare_models(source, other, BATCHES).served.scores.kl
        np.testing.assert_allclose(found.kl, whole.mean(), atol=LIMITS["kl_abs"], rtol=LIMITS["kl_rel"])
        assert found.low <= found.kl <= found.high and found.kl > LIMITS["kl_abs"]
        role = TensorRole(section=Section.TEXT, kind=Kind.LINEAR_OUTPUT, layer=2)
        assert found.bytes_rounded == other.stored_bytes(role)
        assert found.bytes_original == source.stored_bytes(role)


def test_costs_of_parts_of_a_trained_model_add_up(tmp_path: Path) -> None:
    convert(CHECKPOINT, tmp_path / "out", default_policy(int4(128)), max_memory=4 << 30)
    with CheckpointWeights.open(CHECKPOINT) as source, CheckpointWeights.open(tmp_path / "out") as other:
        vocabulary = source.config.text.vocab_size
        batches = choose_windows(CHECKPOINT, vocabulary, texts=(), tokens=768, length=256, seed=0).batches
        states, groups = own_states(source, batches, MemoryStore()), roundable(source)
        experts = [group for group in groups if group.name.startswith("expert")]
        pieces = pieces_of(source, experts, [int4(128)])
        assert len(pieces) == 2 * source.config.text.num_hidden_layers
        alone = sum(one.kl for one in sensitivities(source, batches, states, pieces, MemoryStore()))
        together = compare_models(source, other, batches).plain.scores.kl.mean()
    assert alone == pytest.approx(together, rel=LIMITS["costs_add_up"])


def test_only_what_can_be_stored_is_asked_for(original: Path) -> None:
    with CheckpointWeights.open(original) as source:
        groups = roundable(source)
        assert {piece.group for piece in pieces_of(source, groups, [int4(128)])} < {group.name for group in groups}
        whole = pieces_of(source, groups, [int4(32), NVFP4], by_layer=False)
        assert {piece.layer for piece in whole} == {None}
        assert len(whole) == 2 * len(groups)
