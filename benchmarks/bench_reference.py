"""Time the reference model's layers beside transformers', at the layer shapes of 35B-A3B, in one process.

    python benchmarks/bench_reference.py [--tokens 512] [--long 4096] [--threads 2] [--json FILE]

Both sides hold the same fp32 weights and see the same input; every candidate runs once to warm up, then the candidates
take turns and the minimum and median of their rounds are printed. Ratios below 1 mean that the reference is faster.
The last line runs one layer of each kind for ``--long`` tokens through the layer-wise runner, from a checkpoint on disk
that is made for it, and prints seconds and the peak resident memory of a process of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qconvert.weights.source import CheckpointWeights
from reference_model.config import TextConfig
from reference_model.delta_net import GatedDeltaNet
from reference_model.layerwise import run_layers
from reference_model.moe import SparseMoe
from reference_model.presets import PRESETS
from reference_model.span import place_tokens

ROUNDS = 7


def shapes() -> TextConfig:
    """One linear and one full attention layer of 35B-A3B, with a vocabulary that does not matter here."""
    text = PRESETS["35b-a3b"].text
    return replace(text, num_hidden_layers=2, layer_types=("linear_attention", "full_attention"))


def upstream(config: TextConfig) -> Any:
    """The same sizes as a transformers configuration."""
    from transformers import Qwen3_5MoeTextConfig

    same = {name: getattr(config, name) for name in (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
        "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim",
        "linear_conv_kernel_dim", "num_experts", "num_experts_per_tok", "moe_intermediate_size",
        "shared_expert_intermediate_size", "rms_norm_eps",
    )}  # fmt: skip
    return Qwen3_5MoeTextConfig(**same, layer_types=list(config.layer_types), vocab_size=64)


def fill(module: nn.Module) -> nn.Module:
    """Seeded weights of the size that training gives them."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if "A_log" in name:
                weight.uniform_(0.01, 16, generator=generator).log_()
            elif weight.ndim > 1:
                weight.normal_(0.0, 0.02, generator=generator)
            else:
                weight.fill_(1.0)
    return module.eval()


def measure(candidates: dict[str, Callable[[], object]]) -> dict[str, dict[str, float]]:
    """Seconds of each candidate, the candidates taking turns."""
    for run in candidates.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(ROUNDS):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: {"min": min(t), "median": statistics.median(t)} for name, t in seconds.items()}


def delta_net(config: TextConfig, x: Tensor) -> dict[str, dict[str, float]]:
    """A Gated DeltaNet layer without norms and residuals."""
    from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as theirs

    ours, other = fill(GatedDeltaNet(config)), fill(theirs.Qwen3_5MoeGatedDeltaNet(upstream(config), 0))
    other.load_state_dict(ours.state_dict())
    span = place_tokens(config, x)
    difference = (ours(x, span)[0] - other(x)).abs().max().item()
    return measure({"reference": lambda: ours(x, span), "transformers": lambda: other(x)}) | {
        "difference": {"max": difference}
    }


def moe(config: TextConfig, x: Tensor) -> dict[str, dict[str, float]]:
    """Router, routed experts and shared expert, beside each experts implementation of transformers."""
    from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as theirs

    ours = fill(SparseMoe(config))
    candidates: dict[str, Callable[[], object]] = {"reference": lambda: ours(x)}
    difference = 0.0
    for name in ("eager", "grouped_mm", "batched_mm"):
        if name == "batched_mm" and x.shape[1] > 64:
            continue  # it gathers the weights of every token's experts: 100 GB at 512 tokens
        settings = upstream(config)
        settings._experts_implementation = name
        other = theirs.Qwen3_5MoeSparseMoeBlock(settings).eval()  # type: ignore[no-untyped-call]  # theirs
        other.load_state_dict(ours.state_dict(), assign=True)
        difference = max(difference, (ours(x)[0] - other(x)).abs().max().item())
        candidates[f"transformers {name}"] = partial(other, x)
    return measure(candidates) | {"difference": {"max": difference}}


def long_run(checkpoint: Path, tokens: int, threads: int) -> None:
    """Child process: run the checkpoint's layers for ``tokens`` tokens and print seconds and peak memory."""
    torch.set_num_threads(threads)
    ids = torch.randint(1000, (1, tokens), generator=torch.Generator().manual_seed(0))
    with CheckpointWeights.open(checkpoint) as source:
        start = time.perf_counter()
        run_layers(source.config.text, source, [ids], torch.float32)
        seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


def layerwise(tokens: int, threads: int) -> dict[str, float]:
    """Two layers, one of each kind, from disk."""
    here = Path(__file__)
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "checkpoint"
        subprocess.run(
            [sys.executable, str(here.with_name("make_synthetic.py")), str(made), "--layers", "2"], check=True
        )
        child = [sys.executable, str(here), "--child", str(made), "--long", str(tokens), "--threads", str(threads)]
        result = subprocess.run(child, check=True, capture_output=True, text=True)
    measured: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return measured


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--long", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        long_run(arguments.child, arguments.long, arguments.threads)
        return
    torch.set_num_threads(arguments.threads)
    config = shapes()
    x = torch.randn(1, arguments.tokens, config.hidden_size, generator=torch.Generator().manual_seed(1))
    results: dict[str, Any] = {"torch": torch.__version__, "threads": arguments.threads, "tokens": arguments.tokens}
    with torch.no_grad():
        for name, bench in (("delta_net", delta_net), ("moe", moe)):
            results[name] = bench(config, x)
            times = {key: value for key, value in results[name].items() if key != "difference"}
            best = min(value["min"] for key, value in times.items() if key != "reference")
            for key, value in times.items():
                print(f"{name:10} {key:24} min {value['min'] * 1e3:8.1f} ms  median {value['median'] * 1e3:8.1f} ms")
            print(f"{name:10} reference / best of transformers: {times['reference']['min'] / best:.2f}")
    results["layerwise"] = layerwise(arguments.long, arguments.threads)
    print(
        f"layer-wise, one layer of each kind, {arguments.long} tokens: {results['layerwise']['seconds']:.1f} s, "
        f"peak {results['layerwise']['peak_mb']:.0f} MB"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
