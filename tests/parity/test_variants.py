"""A variant that begins in the middle of a model gives what the whole model with those tensors gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch

from qconvert.core.role import Kind, TensorRole
from qconvert.core.scheme import FP8, Scheme, int4
from qconvert.parity.heads import Side
from qconvert.parity.input_rounding import served_rounding
from qconvert.parity.kept_states import KeptStates
from qconvert.parity.model import compare_models
from qconvert.parity.variants import Setting, Variant, run_variants
from qconvert.weights.boundaries import Boundaries
from qconvert.weights.overlay import OverlaidWeights
from qconvert.weights.source import CheckpointWeights
from reference_model.layer_pass import leave_inputs
from reference_model.layerwise import run_layers
from reference_model.load import MemoryStore
from tests.conftest import Converted
from tests.parity.test_model import ATTENTION_TOO, BATCHES, textbook_kl
from tests.tolerances import tolerances

LIMITS = tolerances("parity")


def roles_where(source: CheckpointWeights, wanted: Callable[[TensorRole], bool]) -> frozenset[TensorRole]:
    return frozenset(one for role in source.stored if wanted(role) for one in role.halves or (role,))


CHOICES: dict[str, Callable[[TensorRole], bool]] = {
    "experts' down, everywhere": lambda role: role.kind is Kind.EXPERT_DOWN,
    "experts' gate in the last layer": lambda role: role.kind is Kind.EXPERT_GATE and role.layer == 2,
    "attention": lambda role: role.kind.value.startswith("attention."),
    "linear attention output in layer 2": lambda role: role.kind is Kind.LINEAR_OUTPUT and role.layer == 2,
    "the head alone": lambda role: role.kind is Kind.HEAD,
    "everything": lambda role: role.section.value == "text",
}


@pytest.fixture(scope="module", params=[FP8, int4(32)], ids=str)
def scene(request: pytest.FixtureRequest, conversions: Converted) -> Iterator[tuple[Setting, CheckpointWeights]]:
    scheme: Scheme = request.param
    original, out = conversions(scheme, rules=ATTENTION_TOO)
    with ExitStack() as stack:
        ours, theirs = (stack.enter_context(CheckpointWeights.open(path)) for path in (original, out))
        kept = KeptStates(store=MemoryStore(), count=len(BATCHES))
        compare_models(ours, theirs, BATCHES, kept=kept)
        yield Setting(
            model=theirs, before=kept.before, reference=Side(source=ours, hidden=kept.original), batches=BATCHES,
            store=MemoryStore(), rows_bytes=1 << 30,
        ), ours  # fmt: skip


def variants(setting: Setting, original: CheckpointWeights) -> list[Variant]:
    chosen = [roles_where(setting.model, wanted) for wanted in CHOICES.values()]
    assert all(chosen)
    return [
        Variant(over=original, roles=roles, rounding=served_rounding(setting.model, roles) or leave_inputs)
        for roles in chosen
    ]


def whole_kl(setting: Setting, original: CheckpointWeights, variant: Variant) -> np.ndarray:
    """The textbook's divergence of two whole forwards, from token to logits."""
    config, logits = setting.model.config.text, []
    mixed = OverlaidWeights(base=setting.model, over=variant.over, chosen=variant.roles.__contains__)
    for source, rounding in ((original, leave_inputs), (mixed, variant.rounding)):
        hidden = run_layers(config, source, BATCHES, torch.float32, input_rounding=rounding)
        head, before = source.tensor("lm_head.weight").float(), rounding("lm_head")
        states = torch.cat([hidden[b][:, :-1].flatten(0, 1) for b in range(len(hidden))])
        logits.append((states if before is None else before(states)) @ head.T)
    return textbook_kl(*logits)


def test_side_by_side_they_are_the_whole_models(scene: tuple[Setting, CheckpointWeights]) -> None:
    setting, original = scene
    some = variants(setting, original)
    found = run_variants(setting, some)
    for name, variant, kl in zip(CHOICES, some, found, strict=True):
        whole = whole_kl(setting, original, variant)
        np.testing.assert_allclose(kl, whole, atol=LIMITS["kl_abs"], rtol=LIMITS["kl_rel"], err_msg=name)
    assert found[-1].max() < LIMITS["kl_abs"]  # the original again, inputs unrounded too
    assert min(one.mean() for one in found[:-1]) > LIMITS["kl_abs"]


def test_a_killed_run_goes_on_to_the_same_numbers(scene: tuple[Setting, CheckpointWeights], tmp_path: Path) -> None:
    setting, original = scene
    some, told = variants(setting, original), list[int]()
    boundaries = Boundaries(folder=tmp_path / "wave", identity="one")

    class KilledError(Exception):
        pass

    def progress(phase: str, done: int, total: int) -> None:
        told.append(done)
        assert done <= total
        if done == 12:
            raise KilledError

    whole = run_variants(setting, some)
    with pytest.raises(KilledError):
        run_variants(setting, some, progress, boundaries=boundaries)
    again = run_variants(setting, some, lambda phase, done, total: told.append(done), boundaries=boundaries)
    assert told.count(11) == 2 and told.count(1) == 1  # the layer in which it was killed, and none before
    for ours, theirs in zip(whole, again, strict=True):
        assert (ours == theirs).all()
