"""Time the three sets of operators that `qconvert export-onnx --ops` writes, on the same weights.

    python benchmarks/bench_operator_sets.py [SRC] [--tokens 128] [--rounds 9]

A checkpoint, by default the demo, is exported by each set, in float32 and with experts in int4 (groups of 32, accuracy
level 0). The packages run in turns: a prompt of random tokens in one piece, then as many tokens one by one behind it.
Printed are tokens a second of CPU time on one thread, of the fastest round, and what loading took, as a Markdown table.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from qconvert.cli.demo import CHECKPOINT
from qconvert.core.scheme import int4
from qconvert.onnx_export.export import export_onnx
from qconvert.onnx_export.operator_sets import OPERATOR_SETS
from qconvert.onnx_export.plan import PackageOptions
from qconvert.onnx_export.runtime import Package
from qconvert.plan.policy import Policy, default_policy

POLICIES: dict[str, Policy | None] = {
    "float32": None,
    "int4": default_policy(int4(32), search=False, rules=()),
}


@dataclass(slots=True)
class Timed:
    """A package and its CPU seconds, the least of each."""

    package: Package
    loading: float
    prefill: float = field(default=float("inf"))
    decode: float = field(default=float("inf"))

    def run(self, tokens: int) -> None:
        """One round."""
        size = self.package.config.text.vocab_size
        ids = np.random.default_rng(0).integers(0, size, (1, 2 * tokens))
        start = time.process_time()
        out = self.package.forward(ids[:, :tokens])
        filled = time.process_time()
        for place in range(tokens, 2 * tokens):
            out = self.package.forward(ids[:, place : place + 1], cache=out.cache)
        self.prefill = min(self.prefill, filled - start)
        self.decode = min(self.decode, time.process_time() - filled)


def load(folder: Path) -> Timed:
    """Load a package for one thread, whose CPU time others on the machine change least."""
    start = time.process_time()
    package = Package(folder, threads=1)
    return Timed(package, time.process_time() - start)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", type=Path, default=CHECKPOINT, metavar="SRC")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        timed = {}
        for stored, policy in POLICIES.items():
            for operators in OPERATOR_SETS:
                out = Path(folder) / f"{operators.name}-{stored}"
                options = PackageOptions(policy=policy, ops=operators.name, accuracy_level=0, mtp=False, vision=False)
                export_onnx(args.source, out, options)
                timed[operators.name, stored] = load(out)
        for _ in range(args.rounds):
            for one in timed.values():
                one.run(args.tokens)
    print(f"| --ops | weights | prefill of {args.tokens}, tokens/s | decode, tokens/s | loading, s |")
    print("|---|---|---|---|---|")
    for (name, stored), one in timed.items():
        rates = f"{args.tokens / one.prefill:,.0f} | {args.tokens / one.decode:,.0f}"
        print(f"| {name} | {stored} | {rates} | {one.loading:.2f} |")


if __name__ == "__main__":
    main()
