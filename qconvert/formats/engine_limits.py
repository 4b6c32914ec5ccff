"""Formats that an engine refuses, or reads otherwise than they are meant: what a converter says when it writes one.

What was run is held by tests/formats and tests/engines; what was only read in an engine's source says so.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from qconvert.core.scheme import Block, Int, Scheme
from qconvert.formats.awq import Awq
from qconvert.formats.float_quantized import FloatQuantized
from qconvert.formats.gptq import Gptq
from qconvert.formats.int_quantized import IntQuantized
from qconvert.formats.mxfp4_packed import Mxfp4Packed
from qconvert.formats.nvfp4_packed import Nvfp4Packed


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A way in which some matrices are stored; ``experts`` for routed ones."""

    scheme: Scheme
    format: str
    experts: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """What one version of one engine makes of it, and how that is known."""

    engine: str
    says: str
    proof: str

    def __str__(self) -> str:
        return f"{self.engine} {self.says} ({self.proof})"


TRANSFORMERS = "transformers 5.23"
VLLM = "vLLM 0.32"


def engine_limits(written: Iterable[Written]) -> list[Limit]:
    """Every limit that applies, once, in the order of the engines' names."""
    found = {limit: None for one in written for limit in _limits(one)}
    return sorted(found, key=lambda limit: (limit.engine, limit.says))


def _limits(written: Written) -> list[Limit]:
    limits = []
    asymmetric = isinstance(written.scheme.grid, Int) and not written.scheme.symmetric
    if asymmetric:
        limits.append(Limit(engine=TRANSFORMERS, says="refuses integers with zero points", proof="run"))
    if asymmetric and written.experts:
        limits.append(
            Limit(engine=VLLM, says="reads experts with zero points through its Marlin kernels only", proof="read")
        )
    if written.format == IntQuantized().name and written.experts:
        limits.append(Limit(engine=TRANSFORMERS, says="refuses experts with int8 activations", proof="run"))
    if written.format == FloatQuantized().name and isinstance(written.scheme.blocking, Block) and written.experts:
        limits.append(Limit(engine=TRANSFORMERS, says="refuses experts in compressed-tensors' fp8 tiles", proof="run"))
    if written.format == Nvfp4Packed().name and written.experts:
        says = "reads nvfp4 experts wrong without a word: it does not apply their second scale"
        limits.append(Limit(engine=TRANSFORMERS, says=says, proof="run"))
    if written.format in (Gptq().name, Awq().name):
        says = f"reads {written.format} only where optimum and gptqmodel are installed"
        limits.append(Limit(engine=TRANSFORMERS, says=says, proof="read"))
    if written.format.startswith("bitsandbytes"):
        limits.append(Limit(engine=VLLM, says="has no loader for bitsandbytes", proof="read"))
    if written.format == Mxfp4Packed().name:
        limits.append(
            Limit(
                engine=VLLM,
                says="rounds the activations of mxfp4 matrices to 4 bits as well on GPUs that multiply in FP4",
                proof="read",
            )
        )
    return limits
