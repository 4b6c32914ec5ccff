"""Time a mixture-of-experts block in ONNX Runtime with its shared expert folded into QMoE, and beside it.

    python benchmarks/bench_fold.py [--experts 256] [--rounds 9] [--threads 2]

Both graphs have the sizes of 35B-A3B (8 of 256 experts for a token, hidden 2048, all widths 512), the same random int4
codes in groups of 128, and the router. They run in one process in turns, for 1 and for 128 tokens, with float32
activations (accuracy level 0) and with activations in eight bits (level 4). Printed are the minimum and the median over
the rounds, and the largest difference between the two outputs over the largest output, as a Markdown table.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from moe_node import Block, Floats, Packed, block_model, in_turns

HIDDEN, WIDTH, TOP_K, GROUP = 2048, 512, 8, 128


def random_block(experts: int) -> Block:
    """A block whose shared expert is beside the routed ones."""
    random = np.random.default_rng(0)

    def packed(*shape: int) -> Packed:
        cols = shape[-1]
        scales = random.uniform(0.5, 1.5, (*shape[:-1], cols // GROUP)) / (4.6 * cols**0.5)
        codes = random.integers(0, 256, (*shape[:-1], cols // 2), np.uint8)
        return Packed(codes=codes, scales=scales.astype(np.float32))

    def matrix(rows: int) -> Floats:
        numbers: Floats = random.standard_normal((rows, HIDDEN), np.float32)
        numbers *= np.float32(HIDDEN**-0.5)
        return numbers

    return Block(
        router=matrix(experts),
        shared_gate=matrix(1),
        gate_up=packed(experts, 2 * WIDTH, HIDDEN),
        down=packed(experts, HIDDEN, WIDTH),
        top_k=TOP_K,
        shared=(packed(WIDTH, HIDDEN), packed(WIDTH, HIDDEN), packed(HIDDEN, WIDTH)),
    )


def folded(block: Block) -> Block:
    """The same block with the shared expert as one more expert."""
    if block.shared is None:
        return block
    gate, up, down = block.shared
    return replace(
        block, gate_up=_longer(block.gate_up, in_turns(gate, up)), down=_longer(block.down, down), shared=None
    )


def _longer(stack: Packed, one: Packed) -> Packed:
    return Packed(
        codes=np.concatenate((stack.codes, one.codes[None])), scales=np.concatenate((stack.scales, one.scales[None]))
    )


def session(block: Block, level: int, threads: int, folder: Path) -> onnxruntime.InferenceSession:
    """The graph in ONNX Runtime, on CPUs."""
    path = folder / "block.onnx"
    onnx.save(block_model(block, accuracy_level=level), path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    made = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    path.unlink()
    return made


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=256, help="routed experts")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    beside = random_block(arguments.experts)
    blocks = {"beside QMoE": beside, "folded into QMoE": folded(beside)}
    print(f"onnxruntime {onnxruntime.__version__}, {arguments.threads} threads, {arguments.experts} experts\n")
    print("| accuracy level | tokens | shared expert | minimum | median | difference |\n|---|---|---|---|---|---|")
    for level in (0, 4):
        with tempfile.TemporaryDirectory() as folder:
            sessions = {name: session(block, level, arguments.threads, Path(folder)) for name, block in blocks.items()}
        for tokens in (1, 128):
            x = np.random.default_rng(1).standard_normal((tokens, HIDDEN)).astype(np.float32)
            outputs = {name: made.run(None, {"x": x})[0] for name, made in sessions.items()}
            first, second = outputs.values()
            difference = float(np.abs(first - second).max() / np.abs(first).max())
            times: dict[str, list[float]] = {name: [] for name in sessions}
            for _ in range(arguments.rounds):
                for name, made in sessions.items():
                    start = time.perf_counter()
                    made.run(None, {"x": x})
                    times[name].append(time.perf_counter() - start)
            for name, taken in times.items():
                least, middle = min(taken) * 1e3, statistics.median(taken) * 1e3
                print(f"| {level} | {tokens} | {name} | {least:.2f} ms | {middle:.2f} ms | {difference:.1e} |")
        del sessions


if __name__ == "__main__":
    main()
