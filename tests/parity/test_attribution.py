"""What parts are worth: measured by restoring them, within a budget, kept when killed, and good for a policy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from qconvert.convert import convert, plan_conversion
from qconvert.core.errors import UsageError
from qconvert.core.role import EXPERT_KINDS, Kind, Section, TensorRole
from qconvert.core.scheme import INT8, MXFP4, Scheme, int4
from qconvert.parity.attribution import Part, Worth, above_knee, affordable, duration
from qconvert.parity.role_groups import MOST, OUTPUT_GATES, QUERIES, role_groups
from qconvert.parity.run import ParityOptions, compare
from qconvert.plan.policy import Rule, default_policy, read_rules
from qconvert.weights.source import CheckpointWeights
from tests.conftest import Converted
from tests.edits import edit_tensors

ASKED = ParityOptions(tokens=128, window=32, explain=True)


def worth(group: str, value: float, low: float | None = None) -> Worth:
    return Worth(
        group=group, layer=None, kl=0.0, worth=value, low=value if low is None else low, high=value,
        bytes_converted=1, bytes_original=2,
    )  # fmt: skip


def test_groups_that_differ_and_matter_are_restored_by_layer(conversions: Converted) -> None:
    told: list[str] = []
    found = compare(*conversions(int4(32)), ASKED, tell=told.append)
    given = found.attribution
    assert given is not None
    assert given.kl == found.metric("kl_mean", "as served").value
    assert {one.group for one in given.groups} == {"expert gate and up", "expert down"}
    assert [one.worth for one in given.groups] == sorted((one.worth for one in given.groups), reverse=True)
    for one in (*given.groups, *given.layers):
        assert one.worth == pytest.approx(given.kl - one.kl)
        assert one.low <= one.worth <= one.high
        assert 2 < one.bytes_original / one.bytes_converted < 4
    assert {one.group for one in given.layers} == set(above_knee(given.groups))
    assert [one.layer for one in given.layers if one.group == given.groups[0].group] == [0, 1, 2]
    assert len(told) == 2 and "2 of at most 8" in told[0]
    assert given.left_out == ()


def test_the_knee_is_the_fewest_groups_that_make_up_most_and_are_surely_worth_something() -> None:
    assert above_knee([worth("a", 5), worth("b", 3), worth("c", 2)]) == ("a", "b")
    assert above_knee([worth("b", 3), worth("a", 5), worth("c", -2)]) == ("a", "b")
    assert above_knee([worth("a", 5), worth("b", 3, low=-1), worth("c", 2)]) == ("a",)
    assert above_knee([worth("a", -1)]) == () == above_knee([])


def test_a_budget_leaves_evenly_spaced_layers() -> None:
    parts = [Part(group=name, layer=layer, roles=frozenset()) for name in "ab" for layer in range(8)]
    price: Callable[..., float] = lambda some: float(len(list(some)))  # noqa: E731
    assert affordable(parts, 99, price) == parts
    some = affordable(parts, 6.5, price)
    assert [part.layer for part in some if part.group == "a"] == [part.layer for part in some if part.group == "b"]
    assert [part.layer for part in some if part.group == "a"] == [1, 4, 6]
    assert affordable(parts, 1.5, price) == []


def test_what_the_budget_leaves_out_is_said_and_done_by_the_next_run(conversions: Converted, tmp_path: Path) -> None:
    work = tmp_path / "work"
    first = compare(*conversions(int4(32)), replace(ASKED, work=work, budget=0.0))
    assert first.attribution is not None
    assert not first.attribution.layers
    assert {layer for _, layer in first.attribution.left_out} == {0, 1, 2}
    assert any("budget left no time" in note and "goes on" in note for note in first.notes)
    told: list[str] = []
    second = compare(*conversions(int4(32)), replace(ASKED, work=work), tell=told.append)
    assert second.attribution is not None and len(told) == 1  # groups are known
    assert second.attribution.groups == first.attribution.groups
    assert not second.attribution.left_out and not list(work.iterdir())
    whole = compare(*conversions(int4(32)), ASKED)
    assert whole.attribution is not None
    assert whole.attribution.layers == second.attribution.layers


def test_a_killed_run_goes_on_to_the_same_worths(conversions: Converted, tmp_path: Path) -> None:
    class KilledError(Exception):
        pass

    phases: list[str] = []
    fatal: list[str] = []

    def progress(phase: str, done: int, total: int) -> None:
        phases.append(phase)
        if phases.count(fatal[-1]) == 4:
            raise KilledError

    asked = replace(ASKED, work=tmp_path / "work")
    for phase in ("layers", "roles restored", "layers restored"):
        fatal.append(phase)
        phases.clear()
        with pytest.raises(KilledError):
            compare(*conversions(int4(32)), asked, progress)
    fatal.append("none")
    phases.clear()
    again = compare(*conversions(int4(32)), asked, progress).attribution
    assert "layers" not in phases and "roles restored" not in phases
    whole = compare(*conversions(int4(32)), ASKED).attribution
    assert again is not None and whole is not None
    assert (again.groups, again.layers, again.policy) == (whole.groups, whole.layers, whole.policy)


def test_the_ruined_matrix_is_where_the_divergence_comes_from(converted: Converted) -> None:
    keep = tuple(
        Rule(match=f"text.{kind}", scheme=INT8, reason="a test")
        for kind in ("attention.[qkv]*y", "attention.value", "attention.output", "shared_expert.*")
    )
    original, out = converted(int4(32), rules=keep)
    name = "model.language_model.layers.1.self_attn.o_proj.weight_scale"
    edit_tensors(out, lambda tensors: tensors[name].mul_(4))
    found = compare(original, out, ASKED).attribution
    assert found is not None
    first = found.groups[0]
    assert first.group == "attention output" and first.low > 0.2 * found.kl
    assert [(one.group, one.layer) for one in found.layers[:1]] == [("attention output", 1)]
    assert 'match = "text.attention.output"\nkeep = true' in found.policy


@pytest.mark.parametrize(
    ("scheme", "rules", "experts"),
    [
        (int4(128), (), int4(32)),
        (MXFP4, (), INT8),
        (int4(32), (Rule(match="text.shared_expert.*", scheme=int4(32), reason="a test"),), INT8),
    ],
    ids=["int4 by 128", "mxfp4", "int4 by 32 and shared"],
)
def test_quantize_takes_the_policy_as_it_is(
    scheme: Scheme, rules: tuple[Rule, ...], experts: Scheme, conversions: Converted, tmp_path: Path
) -> None:
    original, out = conversions(scheme, rules=rules)
    found = compare(original, out, ASKED).attribution
    assert found is not None
    (tmp_path / "policy.toml").write_text(found.policy, encoding="utf-8")
    policy = default_policy(INT8, rules=read_rules(tmp_path / "policy.toml"))  # whatever --scheme says
    convert(original, tmp_path / "again", policy, jobs=1, max_memory=4 << 30)
    with CheckpointWeights.open(out) as before, CheckpointWeights.open(tmp_path / "again") as after:
        for role in before.stored:
            old, new = before.scheme(role), after.scheme(role)
            if role.kind in EXPERT_KINDS and role.section.value == "text":
                assert new == experts
            elif old != new:
                assert new is None or new.weight_bits >= (old.weight_bits if old else 0)
    less = compare(original, tmp_path / "again", replace(ASKED, explain=False))
    assert less.metric("kl_mean", "as served").value < found.kl


def test_a_checkpoint_of_one_method_keeps_to_it(conversions: Converted, tmp_path: Path) -> None:
    original, _ = conversions(int4(128))
    policy = default_policy(int4(128)).stored_as("gptq")
    convert(original, tmp_path / "out", policy, jobs=1, max_memory=4 << 30)
    found = compare(original, tmp_path / "out", ASKED).attribution
    assert found is not None and 'format = "gptq"' in found.policy
    (tmp_path / "policy.toml").write_text(found.policy, encoding="utf-8")
    plan_conversion(original, default_policy(INT8, rules=read_rules(tmp_path / "policy.toml")), max_memory=4 << 30)


def test_there_are_no_more_groups_than_passes() -> None:
    roles = [TensorRole(section=Section.TEXT, kind=kind, layer=0) for kind in Kind]
    groups = role_groups(roles)
    assert len(groups) == MOST
    assert OUTPUT_GATES not in {group.name for group in groups}
    some = role_groups([role for role in roles if role.kind.value.startswith("attention")])
    assert {OUTPUT_GATES, QUERIES} < {group.name for group in some}
    assert all(len(role.halves) == 0 for group in some for role in group.roles)


def test_identical_weights_are_worth_nothing(conversions: Converted) -> None:
    original, _ = conversions(int4(32))
    report = compare(original, original, ASKED)
    assert report.attribution is not None and report.attribution.groups == ()
    assert any("no weight of the text decoder differs" in note for note in report.notes)


def test_without_models_there_is_nothing_to_explain(conversions: Converted) -> None:
    with pytest.raises(UsageError, match="no model is run, which --explain"):
        compare(*conversions(int4(32)), replace(ASKED, run_model=False))


def test_time_is_told_as_people_do() -> None:
    assert [duration(seconds) for seconds in (0.25, 45.2, 600, 9000)] == ["0.2 s", "45 s", "10 min", "2.5 h"]
