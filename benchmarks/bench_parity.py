"""Time the model metrics of `qconvert parity` beside one plain forward of transformers on the same weights.

    python benchmarks/bench_parity.py [CHECKPOINT] [--tokens 10240] [--threads 2] [--rounds 3] [--json FILE]

CHECKPOINT is the demo checkpoint by default. It is converted to int4 (engines round no activation: two models run) and
to fp8 (three run: the original, weights only, as served), and they pass over the held-out texts, from their folders,
with the numbers of layers and without. Transformers holds its model in memory, in float32, and computes all logits;
loading it is not counted. Candidates take turns; printed are the minimum and the median of the rounds, CPU seconds of
the fastest, and both minima over those of transformers. On a machine with other work two threads that wait for each
other say nothing: compare CPU seconds of one thread there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from qconvert.cli.demo import CHECKPOINT
from qconvert.convert import convert
from qconvert.parity.model import compare_models
from qconvert.parity.model_metrics import model_metrics
from qconvert.parity.windows import Windows, choose_windows
from qconvert.plan.policy import default_policy, scheme_named
from qconvert.weights.source import CheckpointWeights


def upstream(checkpoint: Path) -> Callable[[Sequence[Tensor]], None]:
    """One forward of transformers over all batches, logits included."""
    from transformers import Qwen3_5MoeForConditionalGeneration

    model = Qwen3_5MoeForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    model.eval()  # type: ignore[no-untyped-call]  # theirs

    @torch.no_grad()
    def run(batches: Sequence[Tensor]) -> None:
        for ids in batches:
            model(input_ids=ids, use_cache=False)

    return run


def metrics(original: Path, converted: Path, windows: Windows, layers: bool) -> None:
    """All numbers of the models, from the two folders."""
    with CheckpointWeights.open(original) as ours, CheckpointWeights.open(converted) as theirs:
        found = compare_models(ours, theirs, windows.batches, layers=layers)
        for _ in model_metrics(found, windows.places, 0):
            pass


def main() -> None:
    """Print a line a candidate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", default=CHECKPOINT)
    parser.add_argument("--tokens", type=int, default=10_240)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with CheckpointWeights.open(arguments.checkpoint) as source:
        vocabulary = source.config.text.vocab_size
    windows = choose_windows(arguments.checkpoint, vocabulary, texts=(), tokens=arguments.tokens, length=512, seed=0)
    with tempfile.TemporaryDirectory() as work:
        candidates: dict[str, Callable[[], None]] = {
            "transformers": partial(upstream(arguments.checkpoint), windows.batches)
        }
        for name in ("int4", "fp8"):
            out = Path(work) / name
            convert(arguments.checkpoint, out, default_policy(scheme_named(name)), max_memory=8 << 30)
            for layers in (False, True):
                run = partial(metrics, arguments.checkpoint, out, windows, layers)
                candidates[f"parity {name}{' --layers' if layers else ''}"] = run
        wall: dict[str, list[float]] = {name: [] for name in candidates}
        cpu: dict[str, list[float]] = {name: [] for name in candidates}
        for _ in range(arguments.rounds):
            for name, candidate in candidates.items():
                before = time.perf_counter(), time.process_time()
                candidate()
                wall[name].append(time.perf_counter() - before[0])
                cpu[name].append(time.process_time() - before[1])
    results = {name: {"min": min(t), "median": statistics.median(t), "cpu": min(cpu[name])} for name, t in wall.items()}
    theirs = results["transformers"]
    print(f"{windows.tokens:,} tokens in windows of 512, {arguments.threads} threads, {arguments.rounds} rounds")
    for name, one in results.items():
        print(
            f"{name:24} min {one['min']:6.2f} s  median {one['median']:6.2f} s  {one['min'] / theirs['min']:5.2f}x"
            f"  CPU {one['cpu']:6.2f} s  {one['cpu'] / theirs['cpu']:5.2f}x"
        )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
