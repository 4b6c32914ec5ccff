"""What must divide what, on one rank and after ``--tp`` ranks have split a matrix.

o_proj, out_proj and down_proj are split along their inputs, all others along their outputs.
"""

from __future__ import annotations

from collections.abc import Iterator

from qconvert.core.scheme import Block, Group
from qconvert.engine_check.rule import Effect, Engine, Finding, Proof, Rule
from qconvert.engine_check.view import Linear, View

_SPLIT_INPUTS = (".o_proj", ".out_proj", ".down_proj")


def _heads(view: View) -> Iterator[Finding]:
    text, tp = view.config.text, view.tp
    for name in ("num_attention_heads", "linear_num_key_heads", "linear_num_value_heads"):
        if getattr(text, name) % tp:
            yield Finding(module=f"config.json {name}", detail=f"{getattr(text, name)} is not divisible by {tp} ranks")
    heads = text.num_key_value_heads
    if max(heads, tp) % min(heads, tp):
        yield Finding(module="config.json num_key_value_heads", detail=f"{heads} neither divides {tp} nor the reverse")
    for name in ("moe_intermediate_size", "shared_expert_intermediate_size"):
        if getattr(text, name) % tp:
            yield Finding(module=f"config.json {name}", detail=f"{getattr(text, name)} is not divisible by {tp} ranks")


def _linear_groups(view: View) -> Iterator[Finding]:
    for site in view.sites:
        for one in site.members:
            if one.quantized and one.declaration is not None and not one.name.startswith("model.visual."):
                yield from _one(one, view, stacked=len(site.members) > 1 and one is not site.members[-1])


def _one(one: Linear, view: View, *, stacked: bool) -> Iterator[Finding]:
    rows, cols = one.shape
    along_inputs = one.name.endswith(_SPLIT_INPUTS)
    cols = cols // view.tp if along_inputs else cols
    blocking = one.declaration.scheme.blocking if one.declaration else None
    if isinstance(blocking, Group) and cols % blocking.size:
        yield Finding(module=one.name, detail=f"groups of {blocking.size} do not divide {cols} inputs{_per(view)}")
    if isinstance(blocking, Block):
        if view.tp > 1 and along_inputs and cols % blocking.cols:
            yield Finding(module=one.name, detail=f"tiles of {blocking.cols} do not divide {cols} inputs{_per(view)}")
        outputs = _outputs(one, rows, view)
        if not along_inputs and (stacked or view.tp > 1) and outputs % blocking.rows:
            yield Finding(
                module=one.name, detail=f"tiles of {blocking.rows} do not divide {outputs} outputs{_per(view)}"
            )


def _outputs(one: Linear, rows: int, view: View) -> int:
    """Of one rank; keys and values are repeated where there are more ranks than heads."""
    if one.name.endswith((".k_proj", ".v_proj")):
        return max(rows // view.tp, view.config.text.head_dim)
    return rows // view.tp


def _per(view: View) -> str:
    return f" on each of {view.tp} ranks" if view.tp > 1 else ""


_SMALLEST_GROUP = 32
"""Of experts of GPTQ and AWQ in vLLM."""


def _experts(view: View) -> Iterator[Finding]:
    text = view.config.text
    width = text.moe_intermediate_size // view.tp
    for block in view.experts:
        declaration = block.declarations[0]
        if not block.quantized or declaration is None:
            continue
        blocking = declaration.scheme.blocking
        if isinstance(blocking, Group):
            group = _split_group(view, blocking.size, (text.hidden_size, width))
            for what, size in (("hidden", text.hidden_size), ("expert", width)):
                if size % group:
                    detail = f"groups of {group} do not divide the {what} width {size}{_per(view)}"
                    yield Finding(module=block.name, detail=detail)
        if isinstance(blocking, Block) and width % blocking.rows:
            detail = f"tiles of {blocking.rows} do not divide the expert width {width}{_per(view)}"
            yield Finding(module=block.name, detail=detail)


def _split_group(view: View, group: int, sizes: tuple[int, int]) -> int:
    """The group that vLLM goes on with: it halves those of GPTQ and AWQ down to 32 and repeats their scales."""
    while view.method in ("gptq", "awq") and group > _SMALLEST_GROUP and any(size % group for size in sizes):
        group //= 2
    return group


SIZE_RULES: tuple[Rule, ...] = (
    Rule(
        id="vllm-tp-heads",
        engine=Engine.VLLM,
        demands="ranks divide attention heads, linear heads and the widths of experts; key-value heads divide the "
        "ranks, or the reverse",
        source="vllm: models/qwen3_next.py Qwen3NextAttention.__init__, mamba/gdn/qwen_gdn_linear_attn.py, "
        "distributed/utils.py divide",
        proof=Proof.READ,
        effect=Effect.FAILS,
        happens="ends with an assertion",
        remedy="choose another --tensor-parallel-size",
        find=_heads,
    ),
    Rule(
        id="vllm-linear-groups",
        engine=Engine.VLLM,
        demands="groups divide the inputs that a rank has; tiles divide its inputs and outputs where a matrix is split "
        "or stacked",
        source="vllm: distributed/utils.py verify_group_size_divides_partition, utils/fp8_utils.py "
        "validate_fp8_block_shape",
        proof=Proof.READ,
        effect=Effect.FAILS,
        happens="raises 'is not divisible by'",
        remedy="choose fewer ranks, a smaller group, or keep the module",
        find=_linear_groups,
    ),
    Rule(
        id="vllm-expert-groups",
        engine=Engine.VLLM,
        demands="groups divide the hidden width and the part of an expert's width that a rank has; tiles divide the "
        "latter",
        source="vllm: compressed_tensors_moe_wna16.py create_weights, utils/fp8_utils.py "
        "validate_fp8_block_shape_moe, moe_wna16.py MoeWNA16Method.create_weights",
        proof=Proof.READ,
        effect=Effect.FAILS,
        happens="raises 'to be divisible by group_size' or 'is not divisible by'",
        remedy="choose fewer ranks, expert parallelism, or a smaller group",
        find=_experts,
    ),
)
