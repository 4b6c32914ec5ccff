"""What must be stored alike, what no engine reads quantized, and what a loader's configuration may not say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

from qconvert.core.scheme import Scheme
from qconvert.engine_check.rule import Effect, Engine, Finding, Proof, Rule
from qconvert.engine_check.view import PLAIN, ExpertBlock, View
from qconvert.formats.declaration import Declaration


def _way(declaration: Declaration | None) -> tuple[Scheme, str] | None:
    return None if declaration is None else (declaration.scheme, declaration.format.name)


def _stacks(view: View) -> Iterator[Finding]:
    for site in view.sites:
        ways = {(one.storage, _way(one.declaration) if one.quantized else None) for one in site.members}
        if len(ways) > 1:
            yield Finding(module=site.name, detail=f"differ: {', '.join(one.name for one in site.members)}")


def _expert_layers(view: View) -> Iterator[Finding]:
    for block in view.experts:
        storages = {storage for _, storage in block.storages}
        ways = {_way(declaration) for declaration in block.declarations} if block.quantized else set()
        if len(storages) > 1 or len(ways) > 1:
            yield Finding(module=block.name, detail=f"its matrices are stored in {max(len(storages), len(ways))} ways")


def _experts_of_all_layers(view: View) -> Iterator[Finding]:
    """One scheme for all that are quantized; what stays stands in stacks, or it is decoded as well."""
    blocks = [block for block in view.experts if not block.in_mtp and block.quantized is not None]
    quantized = [block for block in blocks if block.quantized]
    for block in quantized[1:]:
        if _way(block.declarations[0]) != _way(quantized[0].declarations[0]):
            yield Finding(module=block.name, detail=f"another scheme than {quantized[0].name}")
    if quantized and view.method == "compressed-tensors":
        for block in blocks:
            if not block.quantized and not block.stacked:
                yield Finding(module=block.name, detail="kept one by one beside quantized experts of other layers")


def _stacked_and_quantized(block: ExpertBlock) -> bool:
    return block.stacked and any(storage != PLAIN for _, storage in block.storages)


def _stacked_experts(view: View) -> Iterator[Finding]:
    for block in view.experts:
        if _stacked_and_quantized(block) and not block.in_mtp:
            yield Finding(module=block.name, detail="quantized experts in one tensor")


def _never(view: View, *, ends: tuple[str, ...], begins: tuple[str, ...] = ()) -> Iterator[Finding]:
    for one in (*view.dense_by_nature, *view.linears):
        if one.quantized and (one.name.endswith(ends) or one.name.startswith(begins)):
            yield Finding(module=one.name, detail="stored quantized")


_GATES = (".mlp.gate", ".mlp.shared_expert_gate")


def _gptq(view: View) -> Iterator[Finding]:
    if view.method != "gptq":
        return
    block = view.quantization
    overrides = {f"dynamic {name!r}": value for name, value in (block.get("dynamic") or {}).items() if name[:2] != "-:"}
    for where, fields in (("quantization_config", {}), *overrides.items()):
        merged: Mapping[str, object] = {**block, **(fields if isinstance(fields, Mapping) else {})}
        if merged.get("sym", True) is not True:
            yield Finding(module=where, detail="sym is false")
        if merged.get("desc_act") and merged.get("group_size") != -1:
            yield Finding(module=where, detail="desc_act is true")


def _activation_order(view: View) -> Iterator[Finding]:
    groups = view.quantization.get("config_groups") or {} if view.method == "compressed-tensors" else {}
    for name, group in groups.items():
        order = (group.get("weights") or {}).get("actorder")
        if order in ("group", "dynamic"):
            yield Finding(module=f"config_groups.{name}", detail=f"actorder is {order!r}")


SCHEME_RULES: tuple[Rule, ...] = (
    Rule(
        id="vllm-stacks",
        engine=Engine.VLLM,
        demands="q, k, v; the shared expert's gate, up; in_proj_qkv, in_proj_z; in_proj_b, in_proj_a have one scheme "
        "and one format",
        source="vllm: models/qwen3_5.py packed_modules_mapping, compressed_tensors/utils.py should_ignore_layer",
        proof=Proof.READ,
        effect=Effect.FAILS,
        happens="stacks them into one matrix, which has one scheme",
        remedy="give all of them the same scheme",
        find=_stacks,
    ),
    Rule(
        id="sglang-stacks",
        engine=Engine.SGLANG,
        demands="the same matrices as in vLLM have one scheme",
        source="sglang: models/qwen3_5.py packed_modules_mapping, compressed_tensors/utils.py should_ignore_layer",
        proof=Proof.READ,
        effect=Effect.FAILS,
        happens="stacks them into one matrix, which has one scheme",
        remedy="give all of them the same scheme",
        find=_stacks,
    ),
    Rule(
        id="vllm-expert-layer",
        engine=Engine.VLLM,
        demands="all routed experts of a layer are stored alike: the scheme is looked up at expert 0's matrices",
        source="vllm: compressed_tensors_moe.py CompressedTensorsMoEMethod.get_moe_method",
        proof=Proof.READ,
        effect=Effect.FAILS,
        happens="refuses three projections that differ; reads other experts as expert 0",
        remedy="give all experts of the layer the same scheme",
        find=_expert_layers,
    ),
    Rule(
        id="sglang-expert-layer",
        engine=Engine.SGLANG,
        demands="all routed experts of a layer are stored alike",
        source="sglang: compressed_tensors.py CompressedTensorsConfig.get_moe_scheme",
        proof=Proof.READ,
        effect=Effect.FAILS,
        happens="refuses three projections that differ; reads other experts as expert 0",
        remedy="give all experts of the layer the same scheme",
        find=_expert_layers,
    ),
    Rule(
        id="transformers-experts",
        engine=Engine.TRANSFORMERS,
        demands="quantized experts of all layers have one scheme, and what stays beside them is stored in stacks",
        source="tests/formats/test_transformers_reads_it.py REFUSED 'int4 beside experts kept one by one'; "
        "transformers: integrations/compressed_tensors.py get_experts_scheme",
        proof=Proof.RUN,
        effect=Effect.FAILS,
        happens="decodes every expert that is stored by itself in the one scheme",
        remedy="quantize the experts of all layers alike, or keep a layer's experts stacked",
        find=_experts_of_all_layers,
    ),
    Rule(
        id="transformers-stacked-experts",
        engine=Engine.TRANSFORMERS,
        demands="quantized experts are stored one matrix each",
        source="tests/engine_check/test_transformers_is_silent.py",
        proof=Proof.RUN,
        effect=Effect.WRONG,
        happens="takes the codes for weights and never applies the scales, without an error",
        remedy="store each expert's matrices as tensors of their own",
        find=_stacked_experts,
    ),
    Rule(
        id="vllm-dense",
        engine=Engine.VLLM,
        demands="routers and the gates of shared experts are stored plain",
        source="vllm: models/qwen3_next.py Qwen3NextSparseMoeBlock.__init__",
        proof=Proof.READ,
        effect=Effect.FAILS,
        happens="has no parameter for their scales",
        remedy="keep them",
        find=partial(_never, ends=_GATES),
    ),
    Rule(
        id="transformers-dense",
        engine=Engine.TRANSFORMERS,
        demands="routers are stored plain",
        source="transformers: models/qwen3_5_moe/modeling_qwen3_5_moe.py Qwen3_5MoeTopKRouter",
        proof=Proof.READ,
        effect=Effect.WRONG,
        happens="has a parameter there and no linear module: scales are never applied",
        remedy="keep them",
        find=partial(_never, ends=_GATES[:1]),
    ),
    Rule(
        id="sglang-dense",
        engine=Engine.SGLANG,
        demands="routers, the gates of shared experts, the vision tower and mtp.fc are stored plain",
        source="sglang: models/qwen2_moe.py Qwen2MoeSparseMoeBlock, models/qwen3_vl.py, models/qwen3_5_mtp.py",
        proof=Proof.READ,
        effect=Effect.WRONG,
        happens="has no parameter for their scales and passes over them",
        remedy="keep them",
        find=partial(_never, ends=(*_GATES, "mtp.fc"), begins=("model.visual.",)),
    ),
    Rule(
        id="vllm-activation-order",
        engine=Engine.VLLM,
        demands="compressed-tensors' activation order is `static`, `weight` or none",
        source="vllm: compressed_tensors.py CompressedTensorsConfig._quantization_scheme_map_from_config",
        proof=Proof.READ,
        effect=Effect.FAILS,
        happens="raises 'group/dynamic activation ordering ... is no longer supported'",
        remedy="quantize with static activation order",
        find=_activation_order,
    ),
    Rule(
        id="vllm-gptq-arguments",
        engine=Engine.VLLM,
        demands="GPTQ is symmetric and without desc_act",
        source="vllm: auto_gptq.py AutoGPTQConfig.TYPE_MAP, utils/gptq_utils.py normalize_and_validate_gptq_desc_act",
        proof=Proof.READ,
        effect=Effect.FAILS,
        happens="raises 'Unsupported quantization config' or '(desc_act=True) is no longer supported'",
        remedy="quantize symmetrically with static activation order",
        find=_gptq,
    ),
)
