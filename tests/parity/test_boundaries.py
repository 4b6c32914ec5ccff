"""A comparison that was killed goes on from the last layer that was finished, to the same numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qconvert.core.errors import UsageError
from qconvert.core.scheme import int4
from qconvert.parity.model import Comparison, compare_models
from qconvert.parity.run import ParityOptions, compare
from qconvert.weights.boundaries import FORMAT, Boundaries
from qconvert.weights.source import CheckpointWeights
from tests.conftest import Converted
from tests.parity.test_model import BATCHES


class KilledError(Exception):
    pass


def run(conversions: Converted, boundaries: Boundaries | None, end: int | None = None) -> tuple[Comparison, list[int]]:
    told: list[int] = []

    def progress(phase: str, done: int, total: int) -> None:
        if phase == "layers":
            told.append(done)
            if done == end:
                raise KilledError

    original, out = conversions(int4(32))
    with CheckpointWeights.open(original) as a, CheckpointWeights.open(out) as b:
        return compare_models(a, b, BATCHES, progress, layers=True, boundaries=boundaries), told


def test_a_killed_run_goes_on_to_the_same_numbers(conversions: Converted, tmp_path: Path) -> None:
    whole, told = run(conversions, None)
    a_layer = len(BATCHES) * 3
    boundaries = Boundaries(folder=tmp_path / "work", identity="one")
    for layer in (1, 3):
        with pytest.raises(KilledError):
            run(conversions, boundaries, end=a_layer * (layer - 1) + a_layer // 2 + 1)
        assert [path.name for path in sorted(boundaries.folder.glob("layer-*"))] == [f"layer-{layer - 1:05}"][
            : layer - 1
        ]
    (boundaries.folder / "layer-00009.partial").mkdir()  # was being written
    rest, retold = run(conversions, boundaries)
    assert retold == told[2 * a_layer :]
    for ours, theirs in ((whole.plain, rest.plain), (whole.served, rest.served)):
        assert (ours.layers, ours.forced) == (theirs.layers, theirs.forced)
        assert (ours.scores.kl == theirs.scores.kl).all()
        assert (ours.scores.nll_converted == theirs.scores.nll_converted).all()
    assert torch.equal(whole.visits, rest.visits)


def test_states_of_another_run_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    Boundaries(folder=folder, identity="one").save(3, [("x", torch.ones(2))])
    found = Boundaries(folder=folder, identity="one").load()
    assert found is not None
    assert found[0] == 3
    assert found[1]("x").tolist() == [1, 1]
    with pytest.raises(UsageError, match="another run"):
        Boundaries(folder=folder, identity="two").load()
    run, said = folder / "run.json", {"format": FORMAT, "identity": "one"}
    assert json.loads(run.read_text()) == said
    run.write_text(json.dumps({"identity": "one"}))  # what an earlier build keeps under these names nobody knows
    with pytest.raises(UsageError, match="another run"):
        Boundaries(folder=folder, identity="one").load()
    run.write_text(json.dumps(said))
    (folder / "layer-00003" / "x").write_bytes(b"cut")
    with pytest.raises(UsageError, match="start over"):
        found[1]("x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words", encoding="utf-8")
    with pytest.raises(UsageError, match="something else"):
        Boundaries(folder=tmp_path / "mine", identity="one").load()


def test_other_tokens_are_another_run_and_a_finished_one_leaves_nothing(conversions: Converted, tmp_path: Path) -> None:
    options = ParityOptions(tokens=64, window=32, work=tmp_path / "work")

    def killed(phase: str, done: int, total: int) -> None:
        if phase == "logits":
            raise KilledError

    with pytest.raises(KilledError):
        compare(*conversions(int4(32)), options, killed)
    with pytest.raises(UsageError, match="another run"):
        compare(*conversions(int4(32)), ParityOptions(tokens=66, window=32, work=tmp_path / "work"))
    compare(*conversions(int4(32)), options)
    assert not list((tmp_path / "work").iterdir())


def test_a_run_that_was_killed_before_it_kept_anything_starts_over(tmp_path: Path) -> None:
    (tmp_path / "run.json.partial").write_text("{", encoding="utf-8")
    boundaries = Boundaries(folder=tmp_path, identity="one")
    assert boundaries.load() is None
    boundaries.clear()
    assert list(tmp_path.iterdir()) == []
