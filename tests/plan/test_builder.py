from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from qconvert.arch.names import role_of
from qconvert.convert import plan_conversion
from qconvert.core.errors import PlanError, QconvertError, SourceError
from qconvert.core.plan import Keep, Plan
from qconvert.core.role import Kind
from qconvert.core.scheme import int4
from qconvert.io.checkpoint import Checkpoint
from qconvert.plan.policy import Rule, default_policy, scheme_named
from tests.checkpoints import Layout, Naming, make_tiny

LAYOUTS: tuple[Layout, ...] = ("fused", "per-expert")


def covered(plan: Plan) -> dict[str, list[tuple[int, int]]]:
    rows: dict[str, list[tuple[int, int]]] = {}
    for step in plan.steps:
        for part in step.inputs:
            rows.setdefault(part.tensor, []).append((part.begin, part.end))
    return rows


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("naming", ["vl", "text"])
def test_every_source_row_is_read_exactly_once(tmp_path: Path, layout: Layout, naming: Naming) -> None:
    make_tiny(tmp_path / "src", layout=layout, naming=naming, vision=naming == "vl")
    plan = plan_conversion(tmp_path / "src", default_policy(int4(32)))
    with Checkpoint.open(tmp_path / "src") as checkpoint:
        rows = covered(plan)
        assert set(rows) == set(checkpoint.tensors)
        for name, parts in rows.items():
            info = checkpoint.tensors[name]
            width = info.shape[-1] if len(info.shape) > 1 else 1
            position = 0
            for begin, end in sorted(parts):
                assert begin == position, name
                position = end
            assert position * width == info.numel


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_output_byte_belongs_to_one_step(tmp_path: Path, layout: Layout) -> None:
    make_tiny(tmp_path / "src", layout=layout)
    plan = plan_conversion(tmp_path / "src", default_policy(int4(32)), shard_bytes=200_000)
    written = [name for step in plan.steps for name in step.outputs]
    assert len(written) == len(set(written))
    assert set(written) == {info.name for info in plan.layout.tensors}
    files = plan.layout.by_file()
    assert len(files) > 2
    for infos in files.values():
        for before, after in pairwise(infos):
            assert before.end == after.begin
        assert all((info.begin - infos[0].begin) % info.dtype.itemsize == 0 for info in infos)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gate_rows_of_a_stacked_expert_come_first(tmp_path: Path, layout: Layout) -> None:
    config = make_tiny(tmp_path / "src", layout=layout)
    plan = plan_conversion(tmp_path / "src", default_policy(int4(32)))
    width = config.text.moe_intermediate_size
    for step in plan.steps:
        if layout == "fused" and step.role.kind in (Kind.EXPERT_GATE, Kind.EXPERT_UP):
            first = 2 * width * (step.role.expert or 0) + (width if step.role.kind is Kind.EXPERT_UP else 0)
            assert (step.inputs[0].begin, step.inputs[0].end) == (first, first + width)


def test_both_layouts_give_the_same_quantized_names(tmp_path: Path) -> None:
    plans = []
    for layout in LAYOUTS:
        make_tiny(tmp_path / layout, layout=layout, mtp=False)
        plans.append(plan_conversion(tmp_path / layout, default_policy(int4(32))))
    names = [{info.name: (info.dtype, info.shape) for info in plan.layout.tensors} for plan in plans]
    assert names[0] == names[1]


def test_experts_that_nobody_rounds_stay_as_they_are_stored(tmp_path: Path) -> None:
    make_tiny(tmp_path / "src")
    plan = plan_conversion(tmp_path / "src", default_policy(int4(32)))
    kept = {step.action.name for step in plan.steps if isinstance(step.action, Keep)}
    assert "mtp.layers.0.mlp.experts.gate_up_proj" in kept
    for name in kept:
        role_of(name)


@pytest.mark.parametrize("match", ["text.router", "text.norm", "text.embedding", "text.linear_attention.a_log"])
def test_what_cannot_be_rounded_is_refused_by_name(tmp_path: Path, match: str) -> None:
    make_tiny(tmp_path / "src")
    rule = Rule(match=match, scheme=scheme_named("int8"), reason="wrong")
    with pytest.raises(PlanError, match=match.replace(".", r"\.")):
        plan_conversion(tmp_path / "src", default_policy(int4(32), rules=(rule,)))


def test_one_of_several_stacked_parts_alone_is_refused(tmp_path: Path) -> None:
    make_tiny(tmp_path / "src")
    rule = Rule(match="text.attention.key", scheme=scheme_named("int8"), reason="wrong")
    with pytest.raises(PlanError, match="k_proj"):
        plan_conversion(tmp_path / "src", default_policy(int4(32), rules=(rule,)))


def test_two_schemes_of_one_format_share_a_checkpoint(tmp_path: Path) -> None:
    make_tiny(tmp_path / "src")
    rule = Rule(match="text.shared_expert.*", scheme=scheme_named("int8"), reason="always active")
    plan = plan_conversion(tmp_path / "src", default_policy(int4(32), rules=(rule,)))
    assert plan.config["quantization_config"]["format"] == "mixed-precision"


def test_two_quant_methods_do_not(tmp_path: Path) -> None:
    make_tiny(tmp_path / "src", group=128)
    rule = Rule(match="text.shared_expert.*", scheme=scheme_named("fp8-block"), reason="wrong")
    with pytest.raises(PlanError, match="quant_method"):
        plan_conversion(tmp_path / "src", default_policy(int4(128), rules=(rule,)))


def test_a_policy_that_rounds_nothing_is_refused(tmp_path: Path) -> None:
    make_tiny(tmp_path / "src")
    rule = Rule(match="*", scheme=None, reason="all")
    with pytest.raises(PlanError, match="quantizes nothing"):
        plan_conversion(tmp_path / "src", default_policy(int4(32), rules=(rule,)))


def test_a_group_that_does_not_divide_names_the_matrix(tmp_path: Path) -> None:
    make_tiny(tmp_path / "src")
    with pytest.raises(QconvertError, match=r"experts\.0\.\w+_proj.*128.*(96|64)"):
        plan_conversion(tmp_path / "src", default_policy(int4(128)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_quantized_source_is_refused(tmp_path: Path, layout: Layout) -> None:
    from qconvert.convert import convert

    make_tiny(tmp_path / "src", layout=layout)
    convert(tmp_path / "src", tmp_path / "out", default_policy(int4(32)))
    with pytest.raises(SourceError, match="already quantized"):
        plan_conversion(tmp_path / "out", default_policy(int4(32)))


@pytest.mark.parametrize("match", ["text.atention.*", "text.expert.gate_up", "*"])
def test_a_rule_that_decides_nothing_is_refused(tmp_path: Path, match: str) -> None:
    make_tiny(tmp_path / "src")
    first = (
        Rule(match="*norm", scheme=None, reason="first") if match != "*" else Rule(match="*", scheme=None, reason="")
    )
    slip = Rule(match=match, scheme=None, reason="a slip", layers=frozenset({0}))
    with pytest.raises(PlanError, match="decides no tensor"):
        plan_conversion(tmp_path / "src", default_policy(int4(32), rules=(first, slip)))
