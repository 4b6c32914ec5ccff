"""What a converter says of engines that refuse what it writes is what tests with those engines see."""

from __future__ import annotations

from typing import Literal

import pytest

from qconvert.core.scheme import FP8, FP8_BLOCK, INT8, LLM_INT8, MXFP4, NVFP4, W8A8, Scheme, bnb4, int4
from qconvert.formats.engine_limits import TRANSFORMERS, VLLM, Written, engine_limits
from qconvert.formats.table import format_for, scheme_for
from tests.formats.test_transformers_reads_it import EXPERTS, REFUSED


def said(scheme: Scheme, *, experts: bool) -> list[str]:
    written = Written(scheme=scheme, format=format_for(scheme).name, experts=experts)
    return [f"{limit.engine}: {limit.says}" for limit in engine_limits([written, written])]


@pytest.mark.parametrize("experts", [True, False])
@pytest.mark.parametrize("scheme", [int4(32), int4(128), INT8], ids=str)
def test_nothing_is_said_of_what_all_read(scheme: Scheme, experts: bool) -> None:
    assert said(scheme, experts=experts) == []


def test_single_matrices_with_scales_for_tokens_are_limited_in_transformers() -> None:
    assert said(FP8, experts=True) == []
    for scheme in (FP8, W8A8):
        (limit,) = said(scheme, experts=False)
        assert limit.startswith(TRANSFORMERS) and "one scale for all tokens" in limit


def test_transformers_refuses_what_its_tests_see_refused() -> None:
    refused = {name for name in REFUSED if "beside" not in name}  # one is about experts that stay, not about a format
    assert refused == {"asymmetric experts", "asymmetric linears", "w8a8 experts", "fp8 tiles of experts"}
    tiles = engine_limits([Written(scheme=FP8_BLOCK, format="float-quantized", experts=True)])
    assert [limit.says for limit in tiles] == ["refuses experts in compressed-tensors' fp8 tiles"]
    assert engine_limits([Written(scheme=FP8_BLOCK, format="float-quantized", experts=False)]) == []
    for scheme, experts in ((int4(32, symmetric=False), True), (int4(32, symmetric=False), False), (W8A8, True)):
        assert any(one.startswith(TRANSFORMERS) and "refuses" in one for one in said(scheme, experts=experts))
    assert "mxfp4" in EXPERTS


def test_transformers_is_said_to_read_some_wrong_and_others_only_with_more_installed() -> None:
    assert any("wrong" in one for one in said(NVFP4, experts=True)) and said(NVFP4, experts=False) == []
    assert [one[: len(VLLM)] for one in said(LLM_INT8, experts=False)] == [VLLM]
    effects = {
        (method, experts): [
            limit.effect
            for limit in engine_limits([Written(scheme=scheme_for(int4(32), method), format=method, experts=experts)])
        ]
        for method in ("gptq", "awq")
        for experts in (True, False)
    }
    assert effects == {
        ("gptq", True): ["wrong"],
        ("gptq", False): ["wrong"],
        ("awq", True): ["refused"],
        ("awq", False): ["restricted"],
    }


@pytest.mark.parametrize(
    ("shape", "said_of_it"),
    [((96, 128), []), ((96, 160), ["inputs"]), ((40, 128), ["outputs"]), ((40, 160), ["outputs", "inputs"])],
)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_shapes_that_bitsandbytes_misreads_are_said(
    kind: Literal["nf4", "fp4"], shape: tuple[int, int], said_of_it: list[str]
) -> None:
    scheme = bnb4(kind)
    written = Written(scheme=scheme, format=format_for(scheme).name, experts=False, shape=shape)
    found = [limit for limit in engine_limits([written]) if limit.engine == TRANSFORMERS]
    assert [limit.effect for limit in found] == ["restricted"] * len(found)
    assert [next(side for side in ("inputs", "outputs") if side in limit.says) for limit in found] == said_of_it


def test_each_limit_is_said_once_and_names_its_engine() -> None:
    asymmetric = Written(scheme=int4(32, symmetric=False), format="pack-quantized", experts=True)
    wide = Written(scheme=int4(128, symmetric=False), format="pack-quantized", experts=True)
    mxfp4 = Written(scheme=MXFP4, format="mxfp4-pack-quantized", experts=True)
    found = engine_limits([mxfp4, asymmetric, wide])
    assert sorted(limit.engine for limit in found) == sorted([TRANSFORMERS, VLLM, VLLM])
    assert all(limit.proof in ("run", "read") and str(limit).startswith(limit.engine) for limit in found)
