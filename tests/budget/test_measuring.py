"""What is measured is kept: killed it goes on, done it costs nothing, and it serves nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qconvert.budget.losses import read_losses
from qconvert.budget.parts import GROUPS, matches_of, parts_of
from qconvert.budget.run import Text, decide
from qconvert.convert import convert
from qconvert.core.errors import Interrupted, PlanError, SourceError, UsageError
from qconvert.core.scheme import int4
from qconvert.io.fingerprint import fingerprint
from qconvert.parity.attribution import TOGETHER
from qconvert.parity.kept_states import StateFolder
from qconvert.parity.model import compare_models
from qconvert.parity.sensitivity import Piece, own_states, sensitivities
from qconvert.plan.policy import Rule, default_policy
from qconvert.weights.source import CheckpointWeights
from reference_model.load import MemoryStore
from tests.budget.known import asked, known, nothing_to_read
from tests.checkpoints import make_tiny

BATCHES = (torch.arange(48).view(2, 24),)
SCHEMES = ("int4-g32", "int8")


def text() -> Text:
    return Text(
        batches=BATCHES, record={"ids_sha256": "a", "window": 24, "tokens": 48, "domains": {"made": {}}, "seed": 0}
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measuring") / "src"
    make_tiny(folder)
    return folder


@pytest.fixture(scope="module")
def measured(source: Path) -> Path:
    path = source.parent / "measured.json"
    decide(source, asked(path, bits=6.0, schemes=SCHEMES), text)
    return path


def test_every_part_is_measured_as_it_is_alone(source: Path, measured: Path) -> None:
    with CheckpointWeights.open(source) as weights:
        losses = read_losses(measured, fingerprint(weights.checkpoint), search=False)
        assert losses is not None
        parts = parts_of(weights, SCHEMES)
        assert not losses.missing(parts)
        part = next(part for part in parts if part.group == "linear attention output" and part.layer == 2)
        states = own_states(weights, BATCHES, StateFolder(folder=source.parent / "states"))
        piece = Piece(group="", layer=2, roles=frozenset(part.roles), scheme=int4(32))
        (alone,) = sensitivities(weights, BATCHES, states, [piece], MemoryStore())
    assert losses.alone(part, "int4-g32") == pytest.approx(alone.kl, rel=1e-4)


def test_all_parts_in_one_scheme_are_predicted_to_cost_what_was_measured(
    source: Path, measured: Path, tmp_path: Path
) -> None:
    rules = tuple(
        Rule(match=match, scheme=int4(32), reason="a test") for group in GROUPS for match in matches_of(group)
    )
    convert(source, tmp_path / "out", default_policy(int4(32), rules=rules), jobs=1, max_memory=4 << 30)
    with CheckpointWeights.open(source) as weights, CheckpointWeights.open(tmp_path / "out") as other:
        kl = compare_models(weights, other, BATCHES).served.scores.kl.mean()
    found = decide(source, asked(measured, bits=9.0, schemes=SCHEMES), nothing_to_read)
    assert dict(found.uniform)["all int4-g32"].kl == pytest.approx(kl, rel=1e-4)


def test_a_second_budget_reads_no_text(source: Path, measured: Path) -> None:
    before = measured.read_bytes()
    found = decide(source, asked(measured, bits=9.0, schemes=SCHEMES), nothing_to_read)
    assert found.decision.kl > 0
    assert measured.read_bytes() == before


@pytest.mark.parametrize(("budget", "says"), [({"target": 99}, "impossible"), ({"bits": 99.0}, "as it is")])
def test_a_budget_that_decides_nothing_is_refused_before_anything_is_measured(
    budget: dict[str, Any], says: str, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match=says):
        decide(source, asked(tmp_path / "none.json", schemes=SCHEMES, **budget), nothing_to_read)
    assert not list(tmp_path.iterdir())


def test_a_run_that_was_killed_measures_what_is_missing(source: Path, measured: Path, tmp_path: Path) -> None:
    path, lines = tmp_path / "partial.json", []

    def kill(phase: str, done: int, total: int) -> None:
        if path.exists():
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match=r"kept in .*partial\.json"):
        decide(source, asked(path, bits=6.0, schemes=SCHEMES), text, progress=kill)
    assert len(json.loads(path.read_text())["measured"]) == TOGETHER
    decide(source, asked(path, bits=6.0, schemes=SCHEMES), text, tell=lines.append)
    whole = json.loads(measured.read_text())["measured"]
    assert f"{len(whole) - TOGETHER + len(SCHEMES)} times with" in lines[0]
    again = json.loads(path.read_text())["measured"]
    assert [one["kl"] for one in again] == pytest.approx([one["kl"] for one in whole], rel=1e-3, abs=1e-9)


def test_another_scheme_is_measured_beside_what_is_known(source: Path, measured: Path, tmp_path: Path) -> None:
    path = tmp_path / "more.json"
    path.write_bytes(measured.read_bytes())
    decide(source, asked(path, bits=9.0, schemes=("int8",)), nothing_to_read)
    lines: list[str] = []
    decide(source, asked(path, bits=9.0, schemes=("int8", "fp8")), text, tell=lines.append)
    with CheckpointWeights.open(source) as weights:
        count = len(parts_of(weights, ("fp8",)))
    assert f"{count + 1} times with" in lines[0]


def test_what_was_measured_otherwise_is_refused(source: Path, measured: Path, tmp_path: Path) -> None:
    make_tiny(tmp_path / "other", seed=1)
    with pytest.raises(UsageError, match="measured on other weights"):
        decide(tmp_path / "other", asked(measured, bits=6.0, schemes=SCHEMES), nothing_to_read)
    with pytest.raises(UsageError, match="measured without searched scales"):
        decide(source, asked(measured, bits=6.0, schemes=SCHEMES, search=True), nothing_to_read)

    def longer() -> Text:
        return Text(batches=BATCHES, record={**text().record, "ids_sha256": "b", "tokens": 96})

    with pytest.raises(UsageError, match=r"measured on 48 tokens of made.* now it is 96"):
        decide(source, asked(measured, bits=6.0, schemes=SCHEMES, text_named=True), longer)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"qconvert_sensitivities": 1}, "no sensitivities of version 2"),
        ({"checkpoint": None}, "other weights"),
        ({"search": 0}, "damaged"),
        ({"text": []}, "damaged"),
        ({"measured": [{"group": "routed experts"}]}, "damaged"),
        ({"measured": [{"group": "g", "layer": -1, "scheme": "int8", "kl": 0, "low": 0, "high": 0}]}, "damaged"),
        ({"measured": [{"group": "g", "layer": 0, "scheme": "int8", "kl": "0", "low": 0, "high": 0}]}, "damaged"),
        ({"together": [{"scheme": "int8", "kl": 0, "low": 0, "high": 0}]}, "damaged"),
        ({"measured": [{"group": "g", "layer": 0, "scheme": "int8", "kl": True, "low": 0, "high": 0}]}, "damaged"),
    ],
)
def test_a_file_of_something_else_is_refused(change: dict[str, Any], says: str, source: Path, tmp_path: Path) -> None:
    path = tmp_path / "known.json"
    known(source, path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}), encoding="utf-8")
    with pytest.raises((SourceError, UsageError), match=says):
        decide(source, asked(path, bits=6.0), nothing_to_read)


@pytest.mark.parametrize("schemes", [(), ("int8", "int8"), ("int3",)])
def test_schemes_that_no_budget_knows_are_refused(schemes: tuple[str, ...], source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="int8"):
        decide(source, asked(tmp_path / "none.json", bits=6.0, schemes=schemes), nothing_to_read)
