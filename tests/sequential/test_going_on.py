"""A calibrated conversion gives the same bytes for any number of threads, any memory, and any interruptions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from qconvert.convert import convert
from qconvert.core.errors import Interrupted, OutputError, PlanError, UsageError
from qconvert.core.scheme import int4
from qconvert.io.checkpoint import Checkpoint
from qconvert.plan.builder import build_plan
from qconvert.plan.policy import Rule, default_policy
from qconvert.sequential import memory
from qconvert.sequential import run as running
from qconvert.sequential.calibration import Calibration
from qconvert.sequential.places import calibrated_steps
from qconvert.verify import verify
from tests.checkpoints import make_tiny
from tests.test_convert import digest

RULES = (
    Rule(match="text.attention.*_norm", scheme=None, reason="a vector", default=True),
    Rule(match="text.attention.*", scheme=int4(32), reason="all"),
    Rule(match="text.linear_attention.qkv", scheme=int4(32), reason="all"),
    Rule(match="text.linear_attention.z", scheme=int4(32), reason="all"),
    Rule(match="text.linear_attention.output", scheme=int4(32), reason="all"),
    Rule(match="text.shared_expert.*", scheme=int4(32), reason="all"),
    Rule(match="text.head", scheme=int4(32), reason="all"),
    Rule(match="mtp.expert.*", scheme=int4(32), reason="all"),
)
POLICY = default_policy(int4(32), rules=RULES)
IDS = torch.from_numpy(np.random.default_rng(5).integers(0, 400, (6, 20)))
CALIBRATION = Calibration(method="gptq", batches=IDS.split(2), record={"of": "a test"})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("going-on") / "src"
    make_tiny(folder)
    return folder


@pytest.fixture(scope="module")
def whole(source: Path) -> str:
    convert(source, source.parent / "whole", POLICY, calibration=CALIBRATION, jobs=2)
    return digest(source.parent / "whole")


def test_threads_and_memory_change_nothing(
    source: Path, whole: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(source, tmp_path / "one", POLICY, calibration=CALIBRATION, jobs=1)
    monkeypatch.setattr(running, "check_room", lambda *_: -1)
    convert(source, tmp_path / "three", POLICY, calibration=CALIBRATION, jobs=3)  # all that waits is on disk
    assert digest(tmp_path / "one") == digest(tmp_path / "three") == whole


def stop_after(steps: int) -> Callable[[int, int], None]:
    told = 0

    def progress(done: int, total: int) -> None:
        nonlocal told
        told += 1
        if told == steps:
            raise KeyboardInterrupt

    return progress


def first_stop(source: Path) -> int:
    """Steps until the second layer is being worked on: what is before it is durable by then."""
    with Checkpoint.open(source) as checkpoint:
        steps = calibrated_steps(build_plan(checkpoint, POLICY))
    return len(steps.others) + len(list(steps.layers[0].all())) + 10


def test_an_interrupted_run_goes_on_from_the_last_layer_to_the_same_bytes(
    source: Path, whole: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, passed = tmp_path / "out", []
    original = running.round_layer

    def watched(shop: object, section: object, number: int, *rest: object, **options: object) -> None:
        passed.append((section, number))
        original(shop, section, number, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(running, "round_layer", watched)
    for steps in (first_stop(source), 40, 35):
        with pytest.raises(Interrupted, match="goes on from there"):
            convert(source, out, POLICY, calibration=CALIBRATION, jobs=2, progress=stop_after(steps))
    convert(source, out, POLICY, calibration=CALIBRATION, jobs=2)
    assert digest(out) == whole
    assert len(passed) < 4 * 4  # three layers and the prediction head, and not all of them four times
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_another_text_is_another_run(source: Path, whole: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        convert(source, out, POLICY, calibration=CALIBRATION, progress=stop_after(first_stop(source)))
    other = replace(CALIBRATION, batches=(IDS + 1).split(2))
    for again in (other, replace(CALIBRATION, damping=0.02), replace(CALIBRATION, propagate=False), None):
        with pytest.raises(OutputError, match="another calibration"):
            convert(source, out, POLICY, calibration=again)
    convert(source, out, POLICY, calibration=CALIBRATION, fresh=True)
    assert digest(out) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_whole_conversion_is_verified_by_repeating_it(source: Path, whole: str) -> None:
    out = source.parent / "whole"
    assert verify(out, source, by=CALIBRATION).faults == ()
    target = next(out.glob("*.safetensors"))
    kept = target.read_bytes()
    target.write_bytes(kept[:-3] + bytes([kept[-3] ^ 16]) + kept[-2:])
    try:
        assert verify(out, source, by=CALIBRATION).faults
    finally:
        target.write_bytes(kept)


def test_a_plan_that_does_not_fit_says_so_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "needs", lambda *_: memory.Needs(work=1 << 40, waiting=0, kept=0))
    monkeypatch.setattr(running, "run", lambda *a, **k: pytest.fail("something is written"))
    with pytest.raises(PlanError, match="--max-memory"):
        convert(source, tmp_path / "out", POLICY, calibration=CALIBRATION)
    assert list(tmp_path.iterdir()) == []


def test_states_that_are_damaged_or_somebody_elses_are_no_beginning(source: Path, whole: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        convert(source, out, POLICY, calibration=CALIBRATION, progress=stop_after(first_stop(source)))
    state = next((tmp_path / ".out.states").glob("layer-*/hidden.0"))
    content = state.read_bytes()
    state.write_bytes(content[:-1] + bytes([content[-1] ^ 128]))
    convert(source, out, POLICY, calibration=CALIBRATION)
    assert digest(out) == whole
    mine = tmp_path / ".other.states" / "layer-00007"
    mine.mkdir(parents=True)
    (mine / "precious").write_text("mine")
    convert(source, tmp_path / "other", POLICY)
    assert (mine / "precious").exists()


def test_the_same_text_in_another_file_repeats_it(source: Path, tmp_path: Path) -> None:
    said = {"ids_sha256": "1", "texts": [{"file": "one.txt"}]}
    first = replace(CALIBRATION, record=said)
    convert(source, tmp_path / "out", POLICY, calibration=first)
    assert (
        verify(tmp_path / "out", source, by=replace(first, record={**said, "texts": [{"file": "two.txt"}]})).faults
        == ()
    )
    with pytest.raises(UsageError, match="calibrated otherwise"):
        verify(tmp_path / "out", source, by=replace(first, record={**said, "ids_sha256": "2"}))
