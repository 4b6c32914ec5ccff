"""On trained weights and text that calibration did not see, each method loses less than rounding to nearest.

What is compared is the squared error of outputs on the unseen half of the text, against searched scales without
calibration, over experts of one layer. Its margin stands in tests/tolerances.toml.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qconvert.core.scheme import FP8, NVFP4, Scheme, int4
from qconvert.numerics.awq import awq, best_of, candidates
from qconvert.numerics.gptq import gptq
from qconvert.numerics.hessian import Moments, blended, factorize, no_moments
from qconvert.numerics.importance import quantize_by_importance
from qconvert.numerics.rounding import quantize, second_scale_for
from tests.numerics.activations import Inputs, TrainedExpert, trained_experts
from tests.tolerances import tolerances

LIMITS = tolerances("calibrated")
LAYER, EXPERTS = 1, (0, 7, 13)

Method = Callable[[Tensor, Moments, Moments], Tensor]


def matrices(expert: TrainedExpert, tokens: int | None) -> Iterator[tuple[str, Tensor, Tensor, Tensor, Tensor]]:
    """Kind, weights, inputs to calibrate with, those of the whole layer, and unseen ones."""
    seen, unseen, layer = expert.rows(expert.seen)[:tokens], expert.rows(expert.unseen), expert.seen.x
    for w in (expert.gate, expert.up):
        yield "gate and up", w, seen, layer, unseen
    yield "down", expert.down, *(expert.inner(x) for x in (seen, layer, unseen))


def left(method: Method, scheme: Scheme, kind: str, *, tokens: int | None = None) -> float:
    """The share of the loss of rounding to nearest that is left, geometric mean over matrices."""
    shares = []
    for index in EXPERTS:
        for found, w, seen, layer, unseen in matrices(trained_experts(LAYER, 4096)[index], tokens):
            if found != kind:
                continue
            second = second_scale_for(scheme, float(w.abs().max()))
            own, pooled = (no_moments(w.shape[1]).add(x) for x in (seen, layer))
            losses = [
                float((unseen @ (v - w).T).square().sum())
                for v in (
                    method(w, own, pooled),
                    quantize(w, scheme, search=True, second=second).quantized.dequantize(),
                )
            ]
            shares.append(math.log(losses[0] / losses[1]))
    return math.exp(sum(shares) / len(shares))


def by_gptq(scheme: Scheme) -> Method:
    def method(w: Tensor, own: Moments, pooled: Moments) -> Tensor:
        second = second_scale_for(scheme, float(w.abs().max()))
        return gptq(w, scheme, factorize(blended(own, pooled)), second=second).quantized.dequantize()

    return method


@pytest.mark.parametrize("kind", ["gate and up", "down"])
@pytest.mark.parametrize(
    ("name", "scheme"),
    [("int4_g128", int4(128)), ("int4_g32_asym", int4(32, symmetric=False)), ("fp8", FP8), ("nvfp4", NVFP4)],
)
def test_error_feedback(name: str, scheme: Scheme, kind: str) -> None:
    assert left(by_gptq(scheme), scheme, kind) < LIMITS[f"gptq_{name}_{kind.replace(' ', '_')}"]


@pytest.mark.parametrize("kind", ["gate and up", "down"])
def test_a_hessian_of_few_tokens_helps_only_beside_the_layers(kind: str) -> None:
    def alone(w: Tensor, own: Moments, pooled: Moments) -> Tensor:
        return gptq(w, int4(128), factorize(blended(own))).quantized.dequantize()

    beside = left(by_gptq(int4(128)), int4(128), kind, tokens=64)
    assert beside < LIMITS[f"gptq_64_tokens_{kind.replace(' ', '_')}"]
    assert left(alone, int4(128), kind, tokens=64) > 1.5 * beside


def test_importance() -> None:
    def method(w: Tensor, own: Moments, pooled: Moments) -> Tensor:
        return quantize_by_importance(w, int4(128), own.mean_squares).quantized.dequantize()

    assert left(method, int4(128), "down") < LIMITS["importance_int4_g128_down"]


def test_scaling_up_to_down() -> None:
    def method(w: Tensor, own: Moments, pooled: Moments) -> Tensor:
        s = awq([w], int4(32), own.mean_abs, factorize(blended(own, pooled))).factors
        return quantize(w * s, int4(32), search=True).quantized.dequantize() / s

    assert left(method, int4(32), "down") < LIMITS["awq_int4_g32_down"]


def test_scaling_what_several_experts_read() -> None:
    """One set of factors for gate and up of several experts, by what these give for seen tokens, serves others too."""
    experts = trained_experts(LAYER, 4096)[::3]
    read, scheme = experts[0].seen.x, int4(32)

    def error(inputs: Callable[[TrainedExpert], Inputs], s: Tensor) -> float:
        total = 0.0
        for one in experts:
            rows, squares = one.rows(inputs(one)), read.square().mean(0) / s.square()
            gate, up = (
                quantize_by_importance(w * s, scheme, squares).quantized.dequantize() / s for w in (one.gate, one.up)
            )
            missed = replace(one, gate=gate, up=up).inner(rows) - one.inner(rows)
            total += float((missed @ one.down.T).square().sum())
        return total

    tried = candidates(read.abs().mean(0))
    found = best_of(tried, [error(lambda one: one.seen, s) for s in tried])
    share = error(lambda one: one.unseen, found.factors) / error(lambda one: one.unseen, tried[0])
    assert share < LIMITS["awq_int4_g32_norm"]


def test_the_seen_and_the_unseen_differ() -> None:
    expert = trained_experts(LAYER, 4096)[0]
    assert len(expert.rows(expert.seen)) > 100 and len(expert.rows(expert.unseen)) > 100
    assert not torch.equal(expert.seen.x[:100], expert.unseen.x[:100])
