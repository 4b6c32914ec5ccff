"""What stays must be listed as each engine reads its list, and nothing that is quantized may be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from qconvert.engine_check.readers import (
    Reader,
    SglangCompressedTensors,
    SglangFp8,
    TransformersCompressedTensors,
    TransformersFp8,
    VllmAwq,
    VllmCompressedTensors,
    VllmFp8,
    VllmGptq,
)
from qconvert.engine_check.rule import Effect, Engine, Finding, Proof, Rule
from qconvert.engine_check.view import View

_HEAD = "lm_head"
"""Another class than linear modules: engines quantize it on request only."""


def _misread(
    view: View, *, method: str, reader: Callable[[View], Reader], passed_over: tuple[str, ...] = (), plain: bool = True
) -> Iterator[Finding]:
    """Modules that the engine takes for something else than they are stored as.

    ``passed_over`` are beginnings of names that the engine does not ask its lists for; ``plain`` says whether lists
    also decide on linear modules that are stored plain.
    """
    if view.method != method:
        return
    reads = reader(view)
    for site in view.sites:
        if site.name == _HEAD or site.name.startswith(passed_over) or site.quantized is None:
            continue
        if site.quantized or plain:
            yield from _compare(site.name, site.quantized, reads.reads(site.name))
    for block in view.experts:
        if block.quantized is not None and not (block.stacked and block.quantized):
            yield from _compare(block.name, block.quantized, reads.reads_experts(block.name))


def _compare(name: str, stored: bool, read: bool | None) -> Iterator[Finding]:
    if read is None:
        yield Finding(module=name, detail="some of its parts are listed as kept, others are not")
    elif stored and not read:
        yield Finding(module=name, detail="stored quantized, but the list keeps it")
    elif read and not stored:
        yield Finding(module=name, detail="stored plain, but the list does not keep it")


def _misread_by_transformers(view: View, *, method: str, reader: Callable[[View], Reader]) -> Iterator[Finding]:
    if view.method != method:
        return
    reads = reader(view)
    for linear in view.linears:
        if not linear.name.startswith("mtp."):
            yield from _compare(linear.name, linear.quantized, reads.reads(linear.name))
    for linear in view.dense_by_nature:
        if linear.name.endswith("shared_expert_gate") and not linear.name.startswith("mtp.") and not linear.quantized:
            yield from _compare(linear.name, False, reads.reads(linear.name))


_LIST_IT = "add its full name to the list, or take it out where it is quantized"

LIST_RULES: tuple[Rule, ...] = (
    Rule(
        id="vllm-ignore",
        engine=Engine.VLLM,
        demands="compressed-tensors' `ignore` covers everything that is stored plain, visual and mtp as well, and "
        "nothing that is quantized: exact names are those of the checkpoint, `re:` patterns are matched from the start "
        "of vLLM's own names",
        source="tests/engines/test_vllm.py FAULTS 'nothing ignored', 'MTP not ignored'; vllm: compressed_tensors/"
        "utils.py should_ignore_layer, find_matched_target",
        proof=Proof.RUN,
        effect=Effect.FAILS,
        happens="looks for scales that are not there, or for a plain weight that is not there",
        remedy=f"{_LIST_IT}; write patterns as `re:.*...`",
        find=partial(
            _misread,
            method="compressed-tensors",
            reader=lambda view: VllmCompressedTensors(view.quantization, view.mapped),
        ),
    ),
    Rule(
        id="vllm-fp8-list",
        engine=Engine.VLLM,
        demands="`modules_to_not_convert` or `ignored_layers` of `quant_method: fp8` has the full name of everything "
        "that is stored plain: in_proj_a and in_proj_b, model.visual and mtp as well; substrings and patterns match "
        "nothing",
        source="tests/engines/test_vllm.py FAULTS 'everything converted'; vllm: fp8.py Fp8Config, "
        "utils/quant_utils.py is_layer_skipped",
        proof=Proof.RUN,
        effect=Effect.WRONG,
        happens="reads 16-bit weights as FP8 without scales: an error, or NaN",
        remedy="list it by its full name",
        find=partial(_misread, method="fp8", reader=lambda view: VllmFp8(view.quantization, view.mapped)),
    ),
    Rule(
        id="vllm-gptq-dynamic",
        engine=Engine.VLLM,
        demands="the `-:` patterns of GPTQ's `dynamic` match the name of every block of experts that is stored plain, "
        "from its start, and of nothing that is quantized",
        source="tests/engines/test_lists.py; vllm: utils/gptq_utils.py get_dynamic_override, auto_gptq.py "
        "get_moe_quant_method",
        proof=Proof.RUN,
        effect=Effect.FAILS,
        happens="looks for packed experts that are not there, or for plain ones",
        remedy="write `-:` and a regular expression for vLLM's name of the block",
        find=partial(
            _misread, method="gptq", reader=lambda view: VllmGptq(view.quantization, view.mapped), plain=False
        ),
    ),
    Rule(
        id="vllm-awq-list",
        engine=Engine.VLLM,
        demands="AWQ's `modules_to_not_convert` has a part of the name of everything that is stored plain and of "
        "nothing that is quantized",
        source="tests/engines/test_lists.py; vllm: auto_awq.py AutoAWQConfig.get_quant_method, utils/quant_utils.py "
        "is_layer_skipped",
        proof=Proof.RUN,
        effect=Effect.FAILS,
        happens="looks for packed weights that are not there, or for plain ones",
        remedy="add its full name, or make the part that matches it longer",
        find=lambda view: _awq(view),
    ),
    Rule(
        id="transformers-ignore",
        engine=Engine.TRANSFORMERS,
        demands="compressed-tensors' `ignore` covers every linear module that is stored plain, and the gates of shared "
        "experts, under the checkpoint's names",
        source="compressed-tensors 0.20: utils/match.py; transformers: quantizer_compressed_tensors.py "
        "_process_model_before_weight_loading",
        proof=Proof.READ,
        effect=Effect.WRONG,
        happens="leaves the weights that it does not find as they were initialised, with a warning",
        remedy=_LIST_IT,
        find=partial(
            _misread_by_transformers,
            method="compressed-tensors",
            reader=lambda view: TransformersCompressedTensors(view.quantization),
        ),
    ),
    Rule(
        id="transformers-fp8-list",
        engine=Engine.TRANSFORMERS,
        demands="`modules_to_not_convert` of `quant_method: fp8` covers every linear module that is stored plain",
        source="transformers: quantizers/quantizers_utils.py should_convert_module",
        proof=Proof.READ,
        effect=Effect.WRONG,
        happens="leaves the scales that it does not find as they were initialised, with a warning",
        remedy=_LIST_IT,
        find=partial(_misread_by_transformers, method="fp8", reader=lambda view: TransformersFp8(view.quantization)),
    ),
    Rule(
        id="sglang-ignore",
        engine=Engine.SGLANG,
        demands="compressed-tensors' `ignore` covers everything that is stored plain under the checkpoint's own names; "
        "for the draft head under the names of stacks too (`qkv_proj`, `gate_up_proj`, or `re:^mtp.*`)",
        source="sglang: layers/quantization/compressed_tensors/utils.py should_ignore_layer, "
        "compressed_tensors.py get_moe_scheme; models/qwen3_5_mtp.py",
        proof=Proof.READ,
        effect=Effect.WRONG,
        happens="drops what it finds no place for, with a line in the log: a draft head that drafts nonsense",
        remedy=f"{_LIST_IT}, and `re:^mtp.*`",
        find=partial(
            _misread,
            method="compressed-tensors",
            reader=lambda view: SglangCompressedTensors(view.quantization),
            passed_over=("model.visual.", "mtp.fc"),
        ),
    ),
    Rule(
        id="sglang-fp8-list",
        engine=Engine.SGLANG,
        demands="the list of `quant_method: fp8` covers everything that is stored plain; names match at dots",
        source="sglang: layers/quantization/fp8.py Fp8Config, quantization/utils.py is_layer_skipped",
        proof=Proof.READ,
        effect=Effect.WRONG,
        happens="reads 16-bit weights as FP8 without scales",
        remedy=_LIST_IT,
        find=partial(
            _misread,
            method="fp8",
            reader=lambda view: SglangFp8(view.quantization),
            passed_over=("model.visual.", "mtp.fc"),
        ),
    ),
)


def _awq(view: View) -> Iterator[Finding]:
    """VLLM takes an empty list from the headers, which cannot be wrong."""
    if view.quantization.get("modules_to_not_convert"):
        yield from _misread(view, method="awq", reader=lambda one: VllmAwq(one.quantization, one.mapped))
