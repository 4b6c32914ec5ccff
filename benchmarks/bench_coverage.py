"""How many tokens reach the experts of a layer: measured on a checkpoint, and drawn for as many as large ones have.

    python benchmarks/bench_coverage.py measure SRC [--tokens 1024 4096 16384 65536]
    python benchmarks/bench_coverage.py draw

``measure`` runs `qconvert calibrate`'s capture with the texts that come along. ``draw`` takes experts' shares from a
log-normal distribution, whose spread ``measure`` tells of a checkpoint, and counts from Poisson distributions: text is
more even than that nowhere and clumpier in places, so what it says of rare experts is what can be hoped for at best.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from calibration.capture import capture
from calibration.coverage import cover
from calibration.data import calibration_windows
from calibration.statistics import Statistics
from qconvert.core.coverage import FEW
from qconvert.memory import available_bytes
from qconvert.weights.source import CheckpointWeights

SIZES = (("35B: 256 experts, 8 a token", 256, 8, 2048), ("397B: 512 experts, 10 a token", 512, 10, 4096))
SPREADS = (0.5, 1.0, 1.5)
TOKENS = (4096, 16_384, 65_536, 262_144, 1_048_576)
DRAWS = 200


def measure(source: Path, tokens: list[int]) -> None:
    """One row of a table for each number of tokens."""
    print("| tokens | fewest | median | most | experts with none | with fewer than 50 | spread |")
    print("|--:|--:|--:|--:|--:|--:|--:|")
    with CheckpointWeights.open(source) as weights:
        vocabulary = weights.config.text.vocab_size
    for count in tokens:
        windows = calibration_windows(source, vocabulary, texts=(), tokens=count, window=min(count, 512), seed=0)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "stats"
            capture(source, out, windows, jobs=2, memory=available_bytes() // 2)
            with Statistics.open(out) as found:
                layers = tuple(found.layers())
        got = np.concatenate([layer.tokens.numpy() for layer in layers])
        coverage = cover(layers, windows.tokens)
        logs = [np.log(np.maximum(layer.tokens.numpy(), 0.5)) for layer in layers]
        spread = float(np.mean([each.std() for each in logs]))
        print(
            f"| {windows.tokens:,} | {got.min():,} | {int(np.median(got)):,} | {got.max():,} | "
            f"{coverage.unreached} of {coverage.experts} | {coverage.few} | {spread:.2f} |"
        )


def drawn(experts: int, visits: int, spread: float, tokens: int, seed: int = 0) -> np.ndarray:
    """Tokens that each expert gets, [draws, experts]."""
    random = np.random.default_rng(seed)
    shares = random.lognormal(sigma=spread, size=(DRAWS, experts))
    shares *= visits / shares.sum(axis=1, keepdims=True)
    return random.poisson(np.minimum(shares, 1.0) * tokens)


def draw() -> None:
    """Shares of experts with few tokens, by their number, by how unequal they are and by tokens."""
    for name, experts, visits, inputs in SIZES:
        print(f"\n{name}\n")
        print("| spread | tokens | on average | rarest | none | fewer than 50 | fewer than inputs |")
        print("|--:|--:|--:|--:|--:|--:|--:|")
        for spread in SPREADS:
            for tokens in TOKENS:
                got = drawn(experts, visits, spread, tokens)
                print(
                    f"| {spread} | {tokens:,} | {tokens * visits / experts:,.0f} | {np.median(got.min(axis=1)):,.0f} | "
                    f"{(got == 0).mean():.1%} | {(got < FEW).mean():.1%} | {(got < inputs).mean():.1%} |"
                )


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measured = commands.add_parser("measure")
    measured.add_argument("source", type=Path)
    measured.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192, 32_768, 65_536])
    commands.add_parser("draw")
    asked = parser.parse_args()
    if asked.command == "measure":
        measure(asked.source, asked.tokens)
    else:
        draw()


if __name__ == "__main__":
    main()
