"""vLLM's own kernels, where this processor has them, compute with what we write what our model does.

They are those for single matrices on CPUs with AVX-512; experts in every format want AMX or a GPU. Beside them vLLM's
functions for activations round them as `qconvert parity` says that engines do.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qconvert.cli.demo import CHECKPOINT
from qconvert.convert import convert
from qconvert.core.scheme import FP8, FP8_BLOCK, NVFP4, W8A8, Activation, Float, Scheme, int4
from qconvert.numerics.activations import quantize_activations
from qconvert.plan.policy import Policy, Rule, default_policy
from tests.conftest import Prove
from tests.edits import round_inputs_to_four_bits
from tests.engines.engine import Loaded, load_in_vllm, run_shim
from tests.engines.test_vllm import (
    ATTENTION,
    FOUR_BITS,
    GATE,
    LINEAR_ATTENTION,
    SHARED,
    VLLM,
    always_active,
    one_thread,
)
from tests.tolerances import tolerances

__all__ = ["one_thread"]

pytestmark = pytest.mark.engines

LIMITS = tolerances("engines")
KEEP_EXPERTS = Rule(match="text.expert.*", scheme=None, reason="their kernels want other processors")
HAS_KERNELS = all(torch.cpu.get_capabilities().get(one, False) for one in ("avx512_f", "avx512_vnni", "avx512_bf16"))
needs_kernels = pytest.mark.skipif(not HAS_KERNELS, reason="vLLM's kernels want AVX-512 with VNNI and BF16")


def single(scheme: Scheme) -> Policy:
    return default_policy(
        scheme, rules=(KEEP_EXPERTS, *always_active(scheme, GATE + SHARED + LINEAR_ATTENTION + ATTENTION))
    )


POLICIES: dict[str, tuple[Policy, str, str]] = {
    "int4": (single(int4(32)), "--scheme int4", "weights"),
    "gptq": (single(int4(32)).stored_as("gptq"), "--scheme int4 --format gptq", "weights"),
    "awq": (single(int4(32)).stored_as("awq"), "--scheme int4 --format awq", "weights"),
    "int4 with zero points": (single(int4(32, symmetric=False)), "--scheme int4 --asymmetric", "weights"),
    "awq with zero points": (
        single(int4(32, symmetric=False)).stored_as("awq"),
        "--scheme int4 --asymmetric --format awq",
        "weights",
    ),
    "w8a8": (single(W8A8), "--scheme w8a8", "inputs"),
    "fp8": (single(FP8), "--scheme fp8", "inputs"),
}
"""What is converted, how it is asked for, and whether kernels round weights alone or inputs too."""

OVER = 448.0 * 6.0 / 32.0
"""What divides inputs of four bits: for values up to 32."""


@pytest.fixture(scope="module")
def loads(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Loaded]:
    root = tmp_path_factory.mktemp("kernels")
    policies = {name: policy for name, (policy, *_) in POLICIES.items()} | {FOUR_BITS: single(NVFP4)}
    checkpoints = {
        name: convert(CHECKPOINT, root / name.replace(" ", "-"), policy, max_memory=4 << 30).out
        for name, policy in policies.items()
    }
    round_inputs_to_four_bits(checkpoints[FOUR_BITS], lambda module: OVER)
    return load_in_vllm(checkpoints, root / "results", intended={}, drafting=(), native=checkpoints)


@needs_kernels
@pytest.mark.parametrize("name", POLICIES)
def test_kernels_compute_what_was_meant(loads: Mapping[str, Loaded], name: str, prove: Prove) -> None:
    loaded, (_, written, rounds) = loads[name], POLICIES[name]
    assert loaded.error is None and not loaded.emulated
    kl = loaded.divergence(served=True)
    assert float(kl.median()) <= LIMITS[f"kernels_{rounds}_kl_median"]
    assert float(kl.mean()) <= LIMITS[f"kernels_{rounds}_kl_mean"]
    prove(written=written, what="linears", engine="vLLM", version=VLLM, result="right")


def test_four_bit_inputs_are_what_is_served(loads: Mapping[str, Loaded]) -> None:
    """With vLLM's own emulation of its kernels for GPUs, which is for any device."""
    loaded = loads[FOUR_BITS]
    assert loaded.error is None and not loaded.emulated
    served, plain = loaded.divergence(served=True), loaded.divergence()
    assert float(served.median()) <= LIMITS["kernels_four_bits_kl_median"] < float(plain.median())
    assert float(served.mean()) <= LIMITS["kernels_four_bits_kl_mean"] < float(plain.mean())


def test_activations_are_rounded_as_vllm_rounds_them(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(65, 384, generator=generator) * torch.logspace(-3, 2, 65)[:, None]).bfloat16()
    x[7], x[8, :128] = 0, 0
    scale, over = 0.011, 61.7
    given = {"x": x, "scale": torch.tensor([scale]), "over": torch.tensor([over])}
    save_file(given, tmp_path / "given.safetensors")
    run_shim("activations.py", tmp_path / "given.safetensors", tmp_path / "rounded.safetensors")
    theirs = load_file(tmp_path / "rounded.safetensors")
    ours = {
        "int8 token": (W8A8.activation, None),
        "fp8 token": (FP8.activation, None),
        "fp8 group": (FP8_BLOCK.activation, None),
        "fp8 static": (Activation(kind="static", grid=FP8.grid), float(given["scale"])),
        "fp4 group": (Activation(kind="dynamic", grid=Float(kind="e2m1"), group=16), float(given["over"])),
    }
    assert theirs.keys() == ours.keys()
    for name, (activation, stored) in ours.items():
        found = quantize_activations(x.float(), activation, stored)
        # on a CPU tokens are multiplied by a reciprocal, and what lies half way between two codes may go either way
        most = LIMITS["activations_half_way"] if name in ("int8 token", "fp8 token") else 0.0
        assert float((found != theirs[name]).float().mean()) <= most, name
