"""What is decided fits, is read by engines, stands in an ordinary policy, and is repeated from the manifest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from qconvert.budget.parts import EXPERTS, Part
from qconvert.budget.policy_file import policy_text
from qconvert.budget.report import document_text, picture
from qconvert.budget.run import Asked, Budgeted, decide, policy_of
from qconvert.convert import convert
from qconvert.core.errors import PlanError, UsageError
from qconvert.core.scheme import INT8
from qconvert.engine_check.rule import Engine
from qconvert.engine_check.run import check_checkpoint
from qconvert.io.shard_file import open_shard
from qconvert.plan.policy import Rule, read_rules
from qconvert.verify import verify
from tests.budget.known import asked, known, nothing_to_read, usual
from tests.checkpoints import Layout, make_tiny

BOTH = (Engine.VLLM, Engine.TRANSFORMERS)


@pytest.fixture(scope="module", params=["fused", "per-expert"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    layout: Layout = request.param
    folder = tmp_path_factory.mktemp(layout) / "src"
    make_tiny(folder, layout=layout)
    known(folder, losses(folder))
    return folder


def losses(source: Path) -> Path:
    return source.parent / "known.json"


def decided(source: Path, ask: Asked) -> Budgeted:
    return decide(source, ask, nothing_to_read)


def weights_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def sizes(source: Path) -> tuple[int, int]:
    """The fewest bytes that a conversion takes, and those of the model as it is."""
    with pytest.raises(PlanError, match="fewest bits the files take") as error:
        decided(source, asked(losses(source), target=1))
    return int(str(error.value).split("take ")[1].split(" bytes")[0].replace(",", "")), weights_in(source)


@pytest.mark.parametrize("share", [0.0, 0.13, 0.5, 0.9])
def test_a_conversion_takes_no_more_than_it_may_and_is_read_and_repeated(
    share: float, source: Path, tmp_path: Path
) -> None:
    least, most = sizes(source)
    target = least + int(share * (most - least))
    found = decided(source, asked(losses(source), target=target))
    convert(source, tmp_path / "out", policy_of(found.rules), jobs=1, max_memory=4 << 30)
    assert weights_in(tmp_path / "out") <= target
    assert not check_checkpoint(tmp_path / "out", BOTH).faults
    assert not verify(tmp_path / "out", source=source, max_memory=4 << 30).faults
    assert found.decision.proven


def test_the_least_is_possible_and_a_byte_less_is_not(source: Path) -> None:
    least, most = sizes(source)
    assert decided(source, asked(losses(source), target=least)).decision.kl > 0
    with pytest.raises(PlanError, match=f"{least - 1:,} bytes are impossible.*{least:,} bytes"):
        decided(source, asked(losses(source), target=least - 1))
    with pytest.raises(PlanError, match="nothing to round"):
        decided(source, asked(losses(source), target=2 * most))


def test_bits_are_those_of_what_may_be_rounded(source: Path) -> None:
    found = decided(source, asked(losses(source), bits=6.0))
    assert found.bits(found.decision.size) <= 6.0
    stored = sum(way.size.tensors for way in found.decision.ways)
    assert found.bits(found.decision.size) == 8 * stored / found.weights
    with pytest.raises(PlanError, match=r"4 bits per weight are impossible: .* there are 4\.\d+"):
        decided(source, asked(losses(source), bits=4.0))


def test_more_bytes_buy_less_loss_until_there_is_none(source: Path) -> None:
    points = decided(source, asked(losses(source), bits=6.0)).points
    assert len(points) > 10
    assert [point.kl for point in points] == sorted((point.kl for point in points), reverse=True)
    assert points[-1].kl == 0.0


def per_layer(part: Part, scheme: str) -> float:
    """Losses by which the experts of one layer want eight bits, and not more."""
    if part.group == EXPERTS and part.layer == 1:
        return 1e-9 if scheme == "int8" else 1.0
    return usual(part, scheme)


def apart(source: Path, path: Path) -> Budgeted:
    known(source, path, loss=per_layer)
    least, most = sizes(source)
    return decided(source, asked(path, target=least + (most - least) // 4, layers_apart=True))


def test_layers_of_experts_differ_where_vllm_alone_reads_them(source: Path, tmp_path: Path) -> None:
    found = apart(source, tmp_path / "known.json")
    rounded = {way.scheme for way in found.decision.ways if way.part.experts} - {None}
    assert len(rounded) > 1
    convert(source, tmp_path / "out", policy_of(found.rules), jobs=1, max_memory=4 << 30)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["qconvert"] == {"engine": "vllm"}
    assert not check_checkpoint(tmp_path / "out", (Engine.VLLM,)).faults
    refused = check_checkpoint(tmp_path / "out", (Engine.TRANSFORMERS,)).faults
    assert {one.rule.id for one in refused} == {"transformers-experts"}
    assert not verify(tmp_path / "out", source=source, max_memory=4 << 30).faults


def test_a_layer_of_experts_is_one_target_not_a_name_for_each(source: Path, tmp_path: Path) -> None:
    found = apart(source, tmp_path / "known.json")
    out = convert(source, tmp_path / "out", policy_of(found.rules), jobs=1, max_memory=4 << 30)
    groups = out.plan.config["quantization_config"]["config_groups"].values()
    experts = [target for group in groups for target in group["targets"] if "experts" in target]
    assert experts and all(target.startswith("re:") for target in experts)


@pytest.mark.parametrize("make", [lambda source, path: decided(source, asked(losses(source), bits=6.0)), apart])
def test_the_policy_file_decides_the_same(make: Callable[[Path, Path], Budgeted], source: Path, tmp_path: Path) -> None:
    found = make(source, tmp_path / "known.json")
    (tmp_path / "policy.toml").write_text(policy_text(found.rules, ("of a test",)), encoding="utf-8")
    again = policy_of(read_rules(tmp_path / "policy.toml"))
    assert again.hash == policy_of(found.rules).hash


def test_what_the_user_decides_is_no_matter_of_the_budget(source: Path) -> None:
    own = Rule(match="text.attention.output", scheme=INT8, reason="a test")
    whole = decided(source, asked(losses(source), bits=6.0))
    rest = decided(source, asked(losses(source), bits=6.0, rules=(own,)))
    left = {way.part.group for way in whole.decision.ways} - {way.part.group for way in rest.decision.ways}
    assert left == {"attention output"}
    assert rest.rules[0] is own
    everything = (Rule(match="text.*", scheme=None, reason="a test"),)
    with pytest.raises(UsageError, match="nothing that a budget could decide"):
        decided(source, asked(losses(source), bits=6.0, rules=everything))


def test_the_picture_and_the_document_have_every_point(source: Path) -> None:
    found = decided(source, asked(losses(source), bits=6.0))
    drawing = ElementTree.fromstring(picture(found))
    assert drawing.tag.endswith("svg")
    said = json.loads(document_text(found))
    assert len(said["frontier"]) == len(found.points)
    assert sum(part["predicted_kl"] for part in said["parts"]) == pytest.approx(said["predicted_kl"])
    assert {"all int8", "routed experts int4-g32"} < set(said["uniform"])


def test_what_is_predicted_to_be_written_is_what_headers_say(source: Path, tmp_path: Path) -> None:
    found = decided(source, asked(losses(source), bits=6.0))
    convert(source, tmp_path / "out", policy_of(found.rules), jobs=1, max_memory=4 << 30)
    written = sum(
        info.nbytes
        for path in (tmp_path / "out").glob("*.safetensors")
        for info in open_shard(path).header.tensors
        if info.name.startswith("model.language_model.layers") and "norm" not in info.name
    )
    assert found.decision.size.tensors <= written
    assert weights_in(tmp_path / "out") == found.file_bytes
    # two estimates of what headers take: of every entry, and of the digits of offsets
    assert abs(found.file_bytes - found.beside - found.decision.size.both) < 20 * 64
