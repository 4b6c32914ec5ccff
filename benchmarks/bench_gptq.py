"""Time error feedback for experts of real shape, and compare its losses with llm-compressor's on the same inputs.

    python benchmarks/bench_gptq.py [--shape 512 2048] [--tokens 1024] [--rounds 5] [--peer PYTHON]

Timed is all that one expert takes on one thread, from its inputs in BF16: second moments of both inputs, blended with
the layer's, their factors, and gate, up and down rounded to int4 in groups of 128, scales searched, on Gaussian weights
and inputs that go together. Printed are CPU seconds of the fastest round. No forward pass is in it, and the layer's
moments are made once.

Losses are those of an expert of the demo checkpoint on held-out text, half of it seen: the squared error of its outputs
on the unseen half, over that of rounding to nearest with searched scales. PYTHON is of an environment with
llm-compressor (``benchmarks/peers/setup.sh``); its ``quantize_weight`` gets the same weights, Hessian and scales, once
the ones that follow from the largest values, as by default it does, and once the searched ones.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qconvert.core.scheme import int4
from qconvert.numerics.gptq import gptq
from qconvert.numerics.hessian import Moments, blended, factorize, no_moments
from qconvert.numerics.rounding import quantize
from tests.numerics.activations import trained_experts

SCHEME = int4(128)
PEER = Path(__file__).parent / "peers" / "gptq_weights.py"
LAYER, EXPERTS, TOKENS = 1, 4, 8192
STARTS = ("largest", "searched")


def correlated(tokens: int, inputs: int, gen: torch.Generator) -> Tensor:
    """BF16 inputs [tokens, inputs] with sizes over two orders of magnitude, mixed with each other."""
    mixing = torch.randn(inputs, inputs, generator=gen) / math.sqrt(inputs) * torch.logspace(0, -2, inputs)[:, None]
    return (torch.randn(tokens, inputs, generator=gen) @ mixing).bfloat16()


def one_expert(
    gate: Tensor, up: Tensor, down: Tensor, x: Tensor, inner: Tensor, layer: tuple[Moments, Moments]
) -> dict[str, float]:
    """CPU seconds by part, of all that is done for one expert."""
    seconds: dict[str, float] = {}
    clock = time.thread_time()

    def lap(name: str) -> None:
        nonlocal clock
        now = time.thread_time()
        seconds[name] = seconds.get(name, 0.0) + now - clock
        clock = now

    for inputs, pooled, matrices in ((x, layer[0], (gate, up)), (inner, layer[1], (down,))):
        hessian = blended(no_moments(inputs.shape[1]).add(inputs), pooled)
        lap("X^T X")
        factor = factorize(hessian)
        lap("factor")
        for w in matrices:
            gptq(w, SCHEME, factor)
        lap("rounding")
    return seconds


def time_experts(width: int, hidden: int, tokens: int, rounds: int) -> None:
    """Print the parts of the fastest round."""
    gen = torch.Generator().manual_seed(0)
    shapes = ((width, hidden), (width, hidden), (hidden, width))
    gate, up, down = (torch.randn(shape, generator=gen).mul_(0.02).bfloat16() for shape in shapes)
    x, inner = correlated(tokens, hidden, gen), correlated(tokens, width, gen)
    layer = tuple(no_moments(part.shape[1]).add(correlated(2048, part.shape[1], gen)) for part in (x, inner))
    runs = [one_expert(gate, up, down, x, inner, (layer[0], layer[1])) for _ in range(rounds + 1)][1:]
    best = min(runs, key=lambda parts: sum(parts.values()))
    print(f"| one expert, {width} x {hidden}, {tokens} tokens | CPU s |\n|---|---|")
    for name, value in best.items():
        print(f"| {name} | {value:.3f} |")
    print(f"| all | {sum(best.values()):.3f} |\n")


def compare_losses(peer: str | None) -> None:
    """Print what is left of the loss of rounding to nearest, by kind of matrix."""
    problems = []
    for expert in trained_experts(LAYER, TOKENS)[:EXPERTS]:
        seen, unseen = expert.rows(expert.seen), expert.rows(expert.unseen)
        problems += [("gate and up", w, seen, unseen) for w in (expert.gate, expert.up)]
        problems.append(("down", expert.down, expert.inner(seen), expert.inner(unseen)))
    results: dict[str, dict[str, list[float]]] = {}
    hessians = [blended(no_moments(w.shape[1]).add(seen)).matrix for _, w, seen, _ in problems]
    theirs = {} if peer is None else of_peer(peer, [w for _, w, _, _ in problems], hessians)
    for i, (kind, w, seen, unseen) in enumerate(problems):
        hessian = blended(no_moments(w.shape[1]).add(seen))
        factor = factorize(hessian)
        found = {
            "qconvert, largest": gptq(w, SCHEME, factor, scales="largest").quantized.dequantize(),
            "qconvert, searched": gptq(w, SCHEME, factor, scales="searched").quantized.dequantize(),
            "qconvert, weighted": gptq(w, SCHEME, factor).quantized.dequantize(),
        }
        found |= {f"llm-compressor, {name}": theirs[f"{i}.{name}"] for name in STARTS if theirs}
        nearest = float((unseen @ (quantize(w, SCHEME, search=True).quantized.dequantize() - w).T).square().sum())
        for name, values in found.items():
            share = float((unseen @ (values - w).T).square().sum()) / nearest
            results.setdefault(name, {}).setdefault(kind, []).append(share)
    print("| loss on unseen text, nearest = 1 | gate and up | down |\n|---|---|---|")
    for name, kinds in results.items():
        print(f"| {name} | " + " | ".join(f"{sum(part) / len(part):.3f}" for part in kinds.values()) + " |")


def of_peer(python: str, matrices: list[Tensor], hessians: list[Tensor]) -> dict[str, Tensor]:
    """What llm-compressor's GPTQ makes of each matrix with each kind of scales, static activation order."""
    given: dict[str, Tensor] = {}
    for i, (w, hessian) in enumerate(zip(matrices, hessians, strict=True)):
        for name in STARTS:
            scale = quantize(w, SCHEME, search=name == "searched").quantized.scale
            parts = {"w": w, "h": hessian, "scale": scale.float()}
            given |= {f"{i}.{name}.{part}": tensor.clone() for part, tensor in parts.items()}
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder, "given.safetensors"), Path(folder, "made.safetensors")
        save_file(given, source)
        subprocess.run([python, str(PEER), str(source), str(made)], check=True, stdout=subprocess.DEVNULL)
        return dict(load_file(made))


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=(512, 2048), metavar=("WIDTH", "HIDDEN"))
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer", metavar="PYTHON", help="interpreter of an environment with llm-compressor")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    width, hidden = arguments.shape
    time_experts(width, hidden, arguments.tokens, arguments.rounds)
    compare_losses(arguments.peer)


if __name__ == "__main__":
    main()
