"""What a checkpoint's weights mean does not depend on how they are stored, and contradictions are named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qconvert.arch.names import Naming, name_of
from qconvert.core.errors import FormatError, SourceError
from qconvert.core.plan import Quantize
from qconvert.core.role import Kind, Section, TensorRole
from qconvert.core.scheme import FP8, FP8_BLOCK, INT8, Scheme, int4
from qconvert.io.checkpoint import Checkpoint
from qconvert.numerics.rounding import quantize
from qconvert.plan.builder import build_plan
from qconvert.plan.policy import Rule, default_policy
from qconvert.weights.source import CheckpointWeights
from reference_model.layerwise import run_layers
from reference_model.load import WeightError, load_weights
from reference_model.model import CausalLM
from reference_model.multimodal import MultimodalLM
from tests.checkpoints import make_tiny
from tests.conftest import Converted
from tests.edits import edit_quantization, edit_tensors, quantization_of

SCHEMES = [int4(32), int4(128), int4(128, symmetric=False), INT8, FP8, FP8_BLOCK]


def test_layout_and_naming_do_not_matter(tmp_path: Path) -> None:
    found = []
    for layout in ("fused", "per-expert"):
        for naming in ("vl", "text"):
            path = tmp_path / f"{layout}-{naming}"
            make_tiny(path, layout=layout, naming=naming, vision=False)
            found.append(CheckpointWeights.open(path))
    first = found[0]
    for other in found[1:]:
        assert other.stored.keys() == first.stored.keys()
        assert other.specs() == first.specs()
        assert all(torch.equal(first.matrix(role), other.matrix(role)) for role in first.stored)
    for source in found:
        source.close()


def test_gate_and_up_of_an_expert_are_the_rows_that_the_stacked_tensor_gives_them(tmp_path: Path) -> None:
    make_tiny(tmp_path / "c")
    tensors = {n: t for shard in (tmp_path / "c").glob("*.safetensors") for n, t in load_file(shard).items()}
    stacked = tensors["model.language_model.layers.2.mlp.experts.gate_up_proj"]
    down = tensors["model.language_model.layers.2.mlp.experts.down_proj"]
    with CheckpointWeights.open(tmp_path / "c") as source:
        expert = source.expert("layers.2.mlp.experts", 4)
        role = TensorRole(section=Section.TEXT, kind=Kind.EXPERT_UP, layer=2, expert=4)
        rows = source.raw(role, 3, 7)
    assert torch.equal(expert.gate, stacked[4, :64].float())
    assert torch.equal(expert.up, stacked[4, 64:].float())
    assert torch.equal(expert.down, down[4].float())
    assert torch.equal(rows, stacked[4, 67:71])


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("layout", ["fused", "per-expert"])
def test_a_converted_matrix_is_its_rounding_and_everything_else_its_bytes(
    scheme: Scheme, layout: str, converted: Converted
) -> None:
    original, out = converted(scheme, layout=layout)
    with CheckpointWeights.open(original) as before, CheckpointWeights.open(out) as after:
        assert after.stored.keys() == before.stored.keys()
        quantized = {role for role in after.stored if after.scheme(role) is not None}
        assert quantized == {
            role for role in before.stored if role.section is Section.TEXT and role.kind.value.startswith("expert.")
        }
        for role in after.stored:
            if role in quantized:
                assert after.scheme(role) == scheme
                expected = quantize(before.matrix(role), scheme).quantized.dequantize()
                assert torch.equal(after.matrix(role), expected), role
            else:
                assert torch.equal(after.raw(role), before.raw(role)), role


def test_dequantized_matrices_pass_through_a_type_on_request(converted: Converted) -> None:
    _, out = converted(INT8)
    role = TensorRole(section=Section.TEXT, kind=Kind.EXPERT_UP, layer=1, expert=2)
    with CheckpointWeights.open(out) as exact, CheckpointWeights.open(out, round_to=torch.bfloat16) as rounded:
        assert rounded.matrix(role).dtype == torch.float32
        assert torch.equal(rounded.matrix(role), exact.matrix(role).bfloat16().float())
        assert not torch.equal(rounded.matrix(role), exact.matrix(role))


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("scheme", [None, int4(32), FP8_BLOCK], ids=str)
def test_the_reference_model_finds_everything_it_asks_for(
    scheme: Scheme | None, tie: bool, tmp_path: Path, converted: Converted
) -> None:
    if scheme is None:
        path = tmp_path / "c"
        make_tiny(path, tie=tie)
    else:
        _, path = converted(scheme, tie=tie)
    with CheckpointWeights.open(path) as source:
        with torch.device("meta"):
            model = CausalLM(source.config.text)
        load_weights(model, source, torch.float32)
    assert not any(weight.is_meta for weight in model.parameters())


def test_the_whole_model_finds_its_vision_tower_on_request(conversions: Converted) -> None:
    original, out = conversions(INT8)
    for path in (original, out):
        with CheckpointWeights.open(path, vision=True) as source:
            with torch.device("meta"):
                model = MultimodalLM(source.config)
            load_weights(model, source, torch.float32)
            state = model.state_dict()
            assert {stacked(name) for name in source.specs()} == state.keys()
            stored = load_file(next(p for p in sorted(original.glob("*.safetensors")) if _holds_vision(p)))
            assert torch.equal(state["visual.pos_embed.weight"], stored["model.visual.pos_embed.weight"].float())
        with CheckpointWeights.open(path) as source:
            assert not any(name.startswith("visual.") for name in source.specs())
            with pytest.raises(KeyError):
                source.tensor("visual.pos_embed.weight")


def stacked(name: str) -> str:
    """The parameter of the reference model that holds the matrix ``name``."""
    pair = re.sub(r"experts\.\d+\.(gate|up)_proj\.weight", "experts.gate_up_proj", name)
    return re.sub(r"experts\.\d+\.down_proj\.weight", "experts.down_proj", pair)


@pytest.mark.parametrize("scheme", [None, int4(32), FP8_BLOCK], ids=str)
def test_a_tensor_is_what_its_spec_says_and_rows_are_its_rows(scheme: Scheme | None, conversions: Converted) -> None:
    rules = () if scheme is None else (Rule(match="text.attention.output", scheme=scheme, reason="a test"),)
    original, out = conversions(scheme or INT8, rules=rules)
    with CheckpointWeights.open(original if scheme is None else out, vision=True) as source:
        for name, spec in source.specs().items():
            if match := re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", name):
                tensor = getattr(source.expert(match[1], int(match[2])), match[3])
            else:
                tensor = source.tensor(name)
            assert (tuple(tensor.shape), tensor.dtype) == (spec.shape, spec.dtype), name
        for name in ("embed_tokens.weight", "lm_head.weight", "layers.1.self_attn.o_proj.weight"):
            whole = source.tensor(name)
            for begin, end in ((0, 1), (5, 9), (127, 130), (200, len(whole)), (len(whole) - 1, len(whole))):
                assert torch.equal(source.rows(name, begin, end), whole[begin:end])
        with pytest.raises(KeyError):
            source.rows("layers.9.self_attn.q_proj.weight", 0, 1)


def test_a_missing_expert_is_named_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tiny(tmp_path / "c", layout="per-expert")
    layer = "model.language_model.layers.0.mlp.experts"
    edit_tensors(tmp_path / "c", lambda t: [t.pop(f"{layer}.{e}.up_proj.weight") for e in (0, 1, 2, 5)])
    missing = r"^4 weights .*:\nmissing: layers\.0\.mlp\.experts\.{0-2,5}\.up_proj\.weight$"
    with CheckpointWeights.open(tmp_path / "c") as source:
        monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("something was read"))
        with pytest.raises(WeightError, match=missing):
            run_layers(source.config.text, source, [torch.zeros(1, 1, dtype=torch.int64)], torch.float32)


def _holds_vision(path: Path) -> bool:
    return "model.visual.pos_embed.weight" in load_file(path)


def test_mixed_schemes_are_told_apart(converted: Converted) -> None:
    rules = (
        Rule(match="text.attention.*", scheme=INT8, reason="always active"),
        Rule(match="text.attention.*norm", scheme=None, reason="a vector"),
    )
    _, out = converted(int4(32), rules=rules[::-1])
    with CheckpointWeights.open(out) as source:
        at = {role.path: str(source.scheme(role)) for role in source.stored if source.scheme(role)}
    assert at == {
        **dict.fromkeys(("text.expert.gate", "text.expert.up", "text.expert.down"), "int4-g32-sym"),
        **{f"text.attention.{part}": "int8-channel-sym" for part in ("query", "key", "value", "output")},
    }


EXPERT = "model.language_model.layers.1.mlp.experts.3.up_proj"


def test_a_missing_part_is_named(converted: Converted) -> None:
    _, out = converted(int4(32))
    edit_tensors(out, lambda tensors: tensors.pop(f"{EXPERT}.weight_scale"))
    with pytest.raises(SourceError, match=rf"{EXPERT}: weight_scale is missing"):
        CheckpointWeights.open(out)


def test_a_part_of_another_shape_is_named(converted: Converted) -> None:
    _, out = converted(int4(32))

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{EXPERT}.weight_scale"] = tensors[f"{EXPERT}.weight_scale"][:, :3].contiguous()

    edit_tensors(out, change)
    with pytest.raises(SourceError, match=rf"{EXPERT}: weight_scale is BF16 \[128, 3\], expected BF16 \[128, 12\]"):
        CheckpointWeights.open(out)


def test_a_module_that_the_configuration_ignores_cannot_be_quantized(converted: Converted) -> None:
    _, out = converted(int4(32))
    ignore = quantization_of(out)["ignore"]
    edit_quantization(out, ignore=[*ignore, EXPERT])
    with pytest.raises(SourceError, match=rf"{EXPERT}: is stored as .*declares no scheme"):
        CheckpointWeights.open(out)


def test_a_plain_module_that_the_configuration_does_not_ignore_is_named(converted: Converted) -> None:
    _, out = converted(int4(32))
    ignore = quantization_of(out)["ignore"]
    edit_quantization(out, ignore=[entry for entry in ignore if "mtp" not in entry])
    with pytest.raises(SourceError, match=r"mtp\.layers\.0\.mlp\.experts\.0\.gate_proj: .*stored as a plain tensor"):
        CheckpointWeights.open(out)


def test_another_scheme_in_the_configuration_does_not_fit_the_parts(converted: Converted) -> None:
    _, out = converted(int4(32))
    groups = quantization_of(out)["config_groups"]
    groups["group_0"]["weights"]["group_size"] = 64
    edit_quantization(out, config_groups=groups)
    with pytest.raises(SourceError, match=r"weight_scale is BF16 \[128, 12\], expected BF16 \[128, 6\]"):
        CheckpointWeights.open(out)


def test_an_unknown_method_is_named(converted: Converted) -> None:
    _, out = converted(int4(32))
    edit_quantization(out, quant_method="exl3")
    with pytest.raises(SourceError, match=r"quant_method is 'exl3'"):
        CheckpointWeights.open(out)


def test_a_stack_of_codes_without_scales_is_refused(converted: Converted) -> None:
    _, out = converted(FP8_BLOCK)
    name = "model.language_model.layers.1.mlp.experts.gate_up_proj"
    edit_tensors(out, lambda t: t.update({name: torch.zeros(6, 256, 384, dtype=torch.float8_e4m3fn)}))
    with pytest.raises(SourceError, match=rf"{name}: {name}_scale_inv is missing"):
        CheckpointWeights.open(out)


def test_a_scale_that_is_no_number_is_an_error_that_names_the_matrix(converted: Converted) -> None:
    _, out = converted(INT8)
    edit_tensors(out, lambda t: t[f"{EXPERT}.weight_scale"].__setitem__((5, 0), torch.nan))
    role = TensorRole(section=Section.TEXT, kind=Kind.EXPERT_UP, layer=1, expert=3)
    with CheckpointWeights.open(out) as source, pytest.raises(FormatError, match=EXPERT):
        source.matrix(role)


def test_plans_and_views_agree_on_schemes(converted: Converted) -> None:
    """A module's scheme read back is the one that its plan line gave it."""
    original, out = converted(FP8)
    with Checkpoint.open(original) as source:
        plan = build_plan(source, default_policy(FP8))
    with CheckpointWeights.open(out) as after:
        for step in plan.steps:
            if isinstance(step.action, Quantize):
                assert after.stored[step.role].name == step.action.module
                assert after.scheme(step.role) == step.action.scheme
            elif step.role.expert is None and not step.role.kind.value.startswith("expert."):
                assert name_of(step.role, Naming.VISION_LANGUAGE) == after.stored[step.role].name


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_rows_of_a_matrix_are_rows_of_the_whole(scheme: Scheme, conversions: Converted) -> None:
    role = TensorRole(section=Section.TEXT, kind=Kind.EXPERT_DOWN, layer=1, expert=3)
    plain = TensorRole(section=Section.TEXT, kind=Kind.EMBEDDING)
    with CheckpointWeights.open(conversions(scheme)[1]) as source:
        block = source.row_block(role)
        whole = source.matrix(role)
        for begin, end in ((0, 384), (block, 2 * block), (128, 384), (0, block)):
            assert torch.equal(source.matrix(role, begin, end), whole[begin:end])
        assert torch.equal(source.matrix(plain, 5, 9), source.matrix(plain)[5:9])
