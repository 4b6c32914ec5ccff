"""A second scale is looked for once, however many matrices share it."""

from __future__ import annotations

from pathlib import Path

import pytest

from qconvert import largest_values
from qconvert.convert import convert, plan_conversion
from qconvert.core.plan import Quantize, Reading
from qconvert.core.scheme import NVFP4
from qconvert.largest_values import LargestValues
from qconvert.plan.policy import default_policy
from tests.checkpoints import make_tiny


@pytest.mark.parametrize("jobs", [1, 4])
def test_every_stack_is_read_once(tmp_path: Path, jobs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tiny(tmp_path / "src")
    asked: list[tuple[Reading, ...]] = []
    found = largest_values._largest
    monkeypatch.setattr(largest_values, "_largest", lambda stack, read: asked.append(stack) or found(stack, read))
    made: list[LargestValues] = []
    init = LargestValues.__init__
    monkeypatch.setattr(LargestValues, "__init__", lambda self: (made.append(self), init(self))[1])
    plan = convert(tmp_path / "src", tmp_path / "out", default_policy(NVFP4), jobs=jobs).plan
    stacks = [step.action.scale_over for step in plan.steps if isinstance(step.action, Quantize)]
    assert len(asked) == len(set(asked)) and set(asked) == set(stacks)
    assert {len(stack) for stack in stacks} == {1, 2}  # a down alone; a gate and an up
    assert [one._stacks for one in made] == [{}]


def test_steps_of_a_stack_hold_one_list_of_it(tmp_path: Path) -> None:
    make_tiny(tmp_path / "src")
    plan = plan_conversion(tmp_path / "src", default_policy(NVFP4))
    stacks = [step.action.scale_over for step in plan.steps if isinstance(step.action, Quantize)]
    assert len({id(stack) for stack in stacks}) == len(set(stacks))
