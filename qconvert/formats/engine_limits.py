"""Formats that an engine refuses, or reads otherwise than they are meant: what a converter says when it writes one.

What was run is held by the tests that each limit names; what was only read in an engine's source says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from qconvert.core.scheme import Block, Channel, Codebook, Int, Scheme
from qconvert.formats.awq import Awq
from qconvert.formats.float_quantized import FloatQuantized
from qconvert.formats.gptq import Gptq
from qconvert.formats.int_quantized import IntQuantized
from qconvert.formats.mxfp4_packed import Mxfp4Packed
from qconvert.formats.nvfp4_packed import Nvfp4Packed
from qconvert.formats.pack_quantized import PackQuantized


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A way in which some matrices are stored; ``experts`` for routed ones, ``shape`` [N, K] for single ones."""

    scheme: Scheme
    format: str
    experts: bool
    shape: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """What one version of one engine makes of it, and how that is known.

    Attributes:
        effect: whether the engine refuses it, answers with wrong numbers, or serves it with a restriction.
        source: the test that ran it, or where it was read.
        applies: whether it is about a way of storing.
    """

    id: str
    engine: str
    says: str
    effect: Literal["refused", "wrong", "restricted"]
    proof: Literal["run", "read"]
    source: str
    applies: Callable[[Written], bool]

    def __str__(self) -> str:
        return f"{self.engine} {self.says} ({self.proof})"


TRANSFORMERS = "transformers 5.23"
VLLM = "vLLM 0.32"


def _asymmetric(written: Written) -> bool:
    integers = isinstance(written.scheme.grid, Int) and not written.scheme.symmetric
    return integers and written.format == PackQuantized().name


def _in_format(written: Written, *, name: str) -> bool:
    return written.format == name


def _four_bits_of_bitsandbytes(written: Written, *, outputs: int = 1, inputs: int = 1) -> bool:
    """Whether it is one whose sides are no multiples of these."""
    rows, cols = written.shape or (0, 0)
    return isinstance(written.scheme.grid, Codebook) and bool(rows % outputs or cols % inputs)


LIMITS: tuple[Limit, ...] = (
    Limit(
        id="transformers-zero-points",
        engine=TRANSFORMERS,
        says="refuses compressed-tensors' integers with zero points",
        effect="refused",
        proof="run",
        source="tests/formats/test_transformers_reads_it.py REFUSED",
        applies=_asymmetric,
    ),
    Limit(
        id="vllm-zero-points",
        engine=VLLM,
        says="reads experts with zero points through its Marlin kernels only",
        effect="restricted",
        proof="read",
        source="vllm: compressed_tensors_moe_wna16.py",
        applies=lambda written: _asymmetric(written) and written.experts,
    ),
    Limit(
        id="transformers-w8a8-experts",
        engine=TRANSFORMERS,
        says="refuses experts with int8 activations",
        effect="refused",
        proof="run",
        source="tests/formats/test_transformers_reads_it.py REFUSED",
        applies=lambda written: written.format == IntQuantized().name and written.experts,
    ),
    Limit(
        id="transformers-fp8-tiles",
        engine=TRANSFORMERS,
        says="refuses experts in compressed-tensors' fp8 tiles",
        effect="refused",
        proof="run",
        source="tests/engine_check/test_transformers_is_silent.py",
        applies=lambda written: (
            written.format == FloatQuantized().name and isinstance(written.scheme.blocking, Block) and written.experts
        ),
    ),
    Limit(
        id="transformers-nvfp4-experts",
        engine=TRANSFORMERS,
        says="reads nvfp4 experts wrong without a word: it does not apply their second scale",
        effect="wrong",
        proof="run",
        source="tests/engine_check/test_transformers_is_silent.py",
        applies=lambda written: written.format == Nvfp4Packed().name and written.experts,
    ),
    Limit(
        id="transformers-token-scales",
        engine=TRANSFORMERS,
        says="rounds what enters the shared expert in fp8 and w8a8 with one scale for all tokens of a batch, not one "
        "each",
        effect="restricted",
        proof="run",
        source="tests/formats/test_activations_in_transformers.py",
        applies=lambda written: (
            written.format in (FloatQuantized().name, IntQuantized().name)
            and isinstance(written.scheme.blocking, Channel)
            and not written.experts
        ),
    ),
    Limit(
        id="transformers-gptq",
        engine=TRANSFORMERS,
        says="cannot run gptq: with optimum and gptqmodel it fills no experts, replaces what `dynamic` leaves out, and "
        "fails in the first forward pass",
        effect="wrong",
        proof="run",
        source="tests/engines/test_gptqmodel.py test_gptq_is_read_wrong_and_fails",
        applies=partial(_in_format, name=Gptq().name),
    ),
    Limit(
        id="transformers-awq",
        engine=TRANSFORMERS,
        says="reads awq only where gptqmodel is installed",
        effect="restricted",
        proof="run",
        source="tests/engines/test_gptqmodel.py test_single_matrices_in_awq_are_read_right",
        applies=lambda written: written.format == Awq().name and not written.experts,
    ),
    Limit(
        id="transformers-awq-experts",
        engine=TRANSFORMERS,
        says="cannot read experts in awq: it replaces no stacked ones, or fails",
        effect="refused",
        proof="run",
        source="tests/engines/test_gptqmodel.py test_experts_in_awq_are_refused",
        applies=lambda written: written.format == Awq().name and written.experts,
    ),
    Limit(
        id="transformers-nf4-rows",
        engine=TRANSFORMERS,
        says="reads nf4 and fp4 wrong without a word, or fails, where 64 does not divide the inputs of a matrix, with "
        "bitsandbytes 0.50.2 on CPUs with AVX-512",
        effect="restricted",
        proof="run",
        source="tests/numerics/test_bitsandbytes_agrees.py test_what_avx512_makes_of_odd_shapes",
        applies=partial(_four_bits_of_bitsandbytes, inputs=64),
    ),
    Limit(
        id="transformers-nf4-outputs",
        engine=TRANSFORMERS,
        says="fails over nf4 and fp4 where 32 does not divide the outputs of a matrix, with bitsandbytes 0.50.2 on "
        "CPUs with AVX-512 for BF16",
        effect="restricted",
        proof="run",
        source="tests/numerics/test_bitsandbytes_agrees.py test_what_avx512_makes_of_odd_shapes",
        applies=partial(_four_bits_of_bitsandbytes, outputs=32),
    ),
    Limit(
        id="vllm-bitsandbytes",
        engine=VLLM,
        says="has no loader for bitsandbytes",
        effect="refused",
        proof="read",
        source="vllm: layers/quantization/__init__.py QUANTIZATION_METHODS",
        applies=lambda written: written.format.startswith("bitsandbytes"),
    ),
    Limit(
        id="vllm-mxfp4-activations",
        engine=VLLM,
        says="rounds the activations of mxfp4 matrices to 4 bits as well on GPUs that multiply in FP4",
        effect="restricted",
        proof="read",
        source="vllm: compressed_tensors/schemes/compressed_tensors_w4a4_mxfp4.py",
        applies=lambda written: written.format == Mxfp4Packed().name,
    ),
)


def engine_limits(written: Iterable[Written]) -> list[Limit]:
    """Every limit that applies, once, in the order of the engines' names."""
    ways = set(written)
    found = [limit for limit in LIMITS if any(map(limit.applies, ways))]
    return sorted(found, key=lambda limit: (limit.engine, limit.says))
