"""From a comparison of two models to what each part of the converted one is worth, and a policy that follows."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from qconvert.core.scheme import Activation
from qconvert.parity.attribution import Attribution, Results, attribute
from qconvert.parity.heads import Side
from qconvert.parity.kept_states import KeptStates, StateFolder
from qconvert.parity.model import Comparison
from qconvert.parity.role_groups import QUERIES, RoleGroup, role_groups
from qconvert.parity.scalings import Scalings
from qconvert.parity.tensors import Outcome, Progress, TensorComparison
from qconvert.parity.variants import Setting
from qconvert.parity.widening import widened
from qconvert.weights.source import CheckpointWeights
from reference_model.load import ActivationStore

_STATES, _RESULTS = "states", "restored"

SAID = "said"
"""Folder for what the original has said so far, see ``continuation``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Explaining:
    """How parts are restored.

    Attributes:
        states: what the comparison has kept for it.
        store: where other hidden states wait.
        rows_bytes: see ``Setting``.
        work: folder that keeps states and results; ``None`` keeps nothing.
        identity: of the run, see ``Boundaries``.
        budget: seconds, see ``attribute``.
        tell: is told what will be done and how long it will take.
    """

    states: KeptStates
    store: ActivationStore
    rows_bytes: int
    work: Path | None = None
    identity: str = ""
    budget: float | None = None
    seed: int = 0
    tell: Callable[[str], None] = lambda line: None


def states_for(batches: int, store: ActivationStore, work: Path | None) -> KeptStates:
    """Where a comparison of so many batches keeps what this needs: in ``work``, or else in ``store``."""
    return KeptStates(store=store if work is None else StateFolder(folder=work / _STATES), count=batches)


def explain(
    original: CheckpointWeights,
    converted: CheckpointWeights,
    batches: Sequence[Tensor],
    tensors: Sequence[TensorComparison],
    found: Comparison,
    how: Explaining,
    progress: Progress = lambda phase, done, total: None,
) -> Attribution:
    """Restore what differs, and write a policy.

    Args:
        original: under the roles of the original, see ``unfolded``.
        converted: the same.
        batches: the tokens of ``found``, int64 [B, T] each.
        tensors: how the weights differ.
        found: the models as they are.
        how: see there.
        progress: see ``run_variants``.

    Raises:
        OutputError: hidden states or results cannot be kept.
    """
    setting = Setting(
        model=converted,
        before=how.states.before,
        reference=Side(source=original, hidden=how.states.original),
        batches=batches,
        store=how.store,
        rows_bytes=how.rows_bytes,
    )
    groups = differing(converted, tensors)
    results = Results()
    if how.work is not None:
        results = Results(folder=StateFolder(folder=how.work / _RESULTS), identity=how.identity)
    attribution = attribute(
        setting,
        original,
        groups,
        found.served.scores.kl,
        found.cost,
        over=Scalings(original, converted).original_scaled,
        results=results,
        budget=how.budget,
        seed=how.seed,
        tell=how.tell,
        progress=progress,
    )
    policy = widened(attribution, groups, original, converted)
    return replace(attribution, policy=policy.text, advice=policy.advice)


def forget(work: Path) -> None:
    """Remove what was kept in ``work``."""
    for name in (_STATES, _RESULTS, SAID):
        shutil.rmtree(work / name, ignore_errors=True)


def attribution_notes(found: Attribution, work: Path | None) -> list[str]:
    """What a reader must know of it."""
    notes = []
    if not found.groups:
        notes.append("No part is worth anything: no weight of the text decoder differs.")
    if found.left_out:
        by_group: dict[str, list[int]] = {}
        for group, layer in found.left_out:
            by_group.setdefault(group, []).append(layer)
        listed = "; ".join(f"{group}: {', '.join(map(str, layers))}" for group, layers in by_group.items())
        go_on = "" if work is None else "; the same command with a larger --budget goes on"
        notes.append(f"The budget left no time to restore these layers: {listed}{go_on}.")
    return notes


def differing(converted: CheckpointWeights, tensors: Sequence[TensorComparison]) -> tuple[RoleGroup, ...]:
    """The groups of tensors whose values differ.

    Output gates are apart unless engines round what enters ``q_proj``, which is one matrix to them.
    """
    roles = [one.role for one in tensors if one.outcome is not Outcome.IDENTICAL and one.sums.squared_error != 0]
    groups = role_groups(roles)
    queries = next((group.roles for group in groups if group.name == QUERIES), frozenset())
    schemes = [converted.scheme(role.whole) for role in queries]
    rounded = any(scheme is not None and scheme.activation != Activation() for scheme in schemes)
    return role_groups(roles, gates_apart=not rounded)
