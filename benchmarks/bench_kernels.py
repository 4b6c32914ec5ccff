"""Time rounding and packing of one expert's matrix: the compiled kernels beside the plain torch expression.

    python benchmarks/bench_kernels.py [--experts 16] [--shape 1024 2048] [--rounds 7] [--search]

Both sides run on one thread over the same Gaussian BF16 matrices, one matrix after the other, and return fresh tensors.
Each runs once to warm up, then they take turns; printed is GB of BF16 per second of CPU time, from the fastest round,
as a Markdown table. The line above it says what the first call took: compiling, or loading what an earlier process
compiled.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from qconvert.core.scheme import FP8, FP8_BLOCK, INT8, MXFP4, Int, Scheme, int4
from qconvert.numerics.finite import all_finite
from qconvert.numerics.packing import pack_int32, pack_with_torch
from qconvert.numerics.rounding import quantize
from qconvert.numerics.rounding_torch import quantize_with_torch

SCHEMES: dict[str, Scheme] = {
    "int4, groups of 128": int4(128),
    "int4, groups of 32": int4(32),
    "int4, groups of 128, zero points": int4(128, symmetric=False),
    "int8": INT8,
    "int8, zero points": replace(INT8, symmetric=False),
    "fp8": FP8,
    "fp8-block": FP8_BLOCK,
    "mxfp4": MXFP4,
}

Work = Callable[[Tensor], object]


def compiled(scheme: Scheme, search: bool) -> Work:
    """Rounding and packing as conversions do it."""

    def work(w: Tensor) -> object:
        codes = quantize(w, scheme, search=search).quantized.codes
        return pack_int32(codes, scheme.weight_bits) if isinstance(scheme.grid, Int) else codes

    return work


def plain(scheme: Scheme, search: bool) -> Work:
    """The same by the torch expressions."""
    flip = 1 << (scheme.weight_bits - 1) if scheme.symmetric else 0

    def work(w: Tensor) -> object:
        codes = quantize_with_torch(w, scheme, search=search).quantized.codes
        if not isinstance(scheme.grid, Int):
            return codes
        return pack_with_torch(codes.view(torch.uint8).reshape(-1), scheme.weight_bits, flip)

    return work


def fastest(work: tuple[Work, Work], matrices: list[Tensor], rounds: int) -> tuple[float, float]:
    """GB of input per second of CPU time."""
    seconds = [float("inf")] * 2
    for side in work:
        side(matrices[0])
    for _ in range(rounds):
        for i, side in enumerate(work):
            start = time.thread_time()
            for w in matrices:
                side(w)
            seconds[i] = min(seconds[i], time.thread_time() - start)
    total = sum(w.nbytes for w in matrices) / 1e9
    return total / seconds[0], total / seconds[1]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--shape", type=int, nargs=2, default=(1024, 2048), metavar=("ROWS", "COLUMNS"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--search", action="store_true", help="search scales as well")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    gen = torch.Generator().manual_seed(0)
    matrices = [torch.randn(*arguments.shape, generator=gen).bfloat16() for _ in range(arguments.experts)]
    start = time.perf_counter()
    quantize(matrices[0][:8], int4(32))
    print(f"first call {time.perf_counter() - start:.1f} s\n")
    print("| | kernels | torch | ratio |\n|---|---|---|---|")
    jobs = [(name, compiled(scheme, False), plain(scheme, False)) for name, scheme in SCHEMES.items()]
    if arguments.search:
        jobs += [(f"{name}, searched", compiled(scheme, True), plain(scheme, True)) for name, scheme in SCHEMES.items()]
    jobs.append(("finite or not", all_finite, lambda w: bool(torch.isfinite(w).all())))
    for name, *work in jobs:
        ours, theirs = fastest((work[0], work[1]), matrices, arguments.rounds)
        print(f"| {name} | {ours:.2f} | {theirs:.2f} | {ours / theirs:.1f} |", flush=True)


if __name__ == "__main__":
    main()
