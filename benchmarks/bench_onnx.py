"""Time packages beside onnxruntime-genai's own export and beside transformers, as whole processes in one run.

    bash tests/engines/setup.sh
    python benchmarks/bench_onnx.py WORK [--demo] [--rounds 3] [--json FILE]

WORK gets a random checkpoint of four layers with the layer shapes of 35B-A3B, 64 experts of which 8 are chosen, and a
small vocabulary, or with ``--demo`` the text model of the demo checkpoint; of it a package in which qconvert rounds
every matrix to int4 in groups of 128 that genai's builder rounds (but for router and shared-expert gate, which it also
rounds), one with int4 experts and everything else that is always active in int8, one with int4 experts and the rest in
float32, and genai's own with the same bits, blocks and accuracy level. Its builder gives no level to experts, which
then see float32 activations; so its package is timed a second time with the level of ours written into these nodes. In
the demo, whose sizes 128 does not divide, groups have 32. A round runs each in onnxruntime-genai on the same two
processors, then transformers in float32; the first one runs vLLM too, which takes two minutes to start. The
best of all rounds counts. The limit of memory is what a token must read, over what the processors read in a second.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import torch
from make_synthetic import config_json, make, shrink
from safetensors.torch import load_file, save_file
from torch import Tensor

from qconvert.cli.demo import CHECKPOINT
from reference_model.config import ModelConfig
from reference_model.presets import PRESETS

HERE = Path(__file__).parent
ROOT = HERE.parent
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "generation_config.json")
VOCABULARY = 2048
"""That of the demo's tokenizer, which genai's builder wants to see."""

EXPERTS = 64
LEVEL = 4
PROMPTS = (128, 512)
NEW = 32
REPEATS = 3

LIKE_GENAI = HERE / "packages" / "like_genai.toml"
OURS = {
    "qconvert, int4 as genai": ("--policy", "{like_genai}"),
    "qconvert, int4 experts, int8 rest": ("--preset", "mixed"),
    "qconvert, int4 experts, float32 rest": (),
}
GENAI = "onnxruntime-genai's builder, int4"
LEVELLED = "the same, experts at that level too"
TRANSFORMERS = "transformers, float32"
VLLM = "vLLM's build for CPUs, bfloat16"
VLLM_SHIM = ROOT / "tests" / "engines" / "vllm_shim"
"""What its import needs here; no kernel is replaced."""


def config() -> ModelConfig:
    """Real layers, few experts, few words."""
    whole = shrink(PRESETS["35b-a3b"], 4, mtp=False, vision=False)
    return replace(whole, text=replace(whole.text, num_experts=EXPERTS, vocab_size=VOCABULARY))


def make_text_of_demo(source: Path) -> None:
    """Write the demo checkpoint without vision tower and prediction head, as no other tool exports both."""
    source.mkdir(parents=True)
    tensors: dict[str, Tensor] = {}
    for shard in sorted(CHECKPOINT.glob("*.safetensors")):
        tensors |= load_file(shard)
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(("mtp.", "model.visual."))}
    save_file(kept, source / "model.safetensors", {"format": "pt"})
    whole = ModelConfig.from_file(CHECKPOINT / "config.json")
    text = shrink(whole, whole.text.num_hidden_layers, mtp=False, vision=False)
    (source / "config.json").write_text(json.dumps(config_json(text), indent=2), encoding="utf-8")


def prepare(work: Path, genai_python: Path, *, demo: bool) -> None:
    """Make the checkpoint and all packages that are not there yet."""
    source = work / "source"
    if not source.exists():
        if demo:
            make_text_of_demo(source)
        else:
            make(source, config())
        for name in TOKENIZER:
            shutil.copy(CHECKPOINT / name, source / name)
    group = 32 if demo else 128
    like_genai = work / LIKE_GENAI.name
    rules = LIKE_GENAI.read_text(encoding="utf-8")
    like_genai.write_text(rules.replace('scheme = "int4"', f'scheme = "int4"\ngroup = {group}'), encoding="utf-8")
    command = Path(sys.executable).with_name("qconvert")
    for name, options in OURS.items():
        if not _folder(work, name).exists():
            say(f"exporting: {name}")
            chosen = [option.format(like_genai=like_genai) for option in options]
            scheme = ("--scheme", "int4", "--group", str(group), "--accuracy-level", str(LEVEL), "--json")
            subprocess.run(
                [str(command), "export-onnx", str(source), str(_folder(work, name)), *scheme, *chosen],
                check=True,
                capture_output=True,
            )
    if not _folder(work, GENAI).exists():
        say(f"exporting: {GENAI}")
        builder = [str(genai_python), "-m", "onnxruntime_genai.models.builder"]
        builder += ["-i", str(source), "-o", str(_folder(work, GENAI))]
        extra = ["--extra_options", f"block_size={group}", f"qmoe_block_size={group}", f"accuracy_level={LEVEL}"]
        subprocess.run(
            [*builder, "-p", "int4", "-e", "cpu", "-c", str(work / "cache"), *extra],
            check=True, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
    if not _folder(work, LEVELLED).exists():
        level_experts(_folder(work, GENAI), _folder(work, LEVELLED))
    same_products(_folder(work, next(iter(OURS))), _folder(work, GENAI), group)


def level_experts(package: Path, out: Path) -> None:
    """Copy a package and have its QMoE nodes round activations as ours do."""
    shutil.copytree(package, out)
    (path,) = out.glob("*.onnx")
    graph = onnx.load(path, load_external_data=False)
    for node in graph.graph.node:
        if node.op_type == "QMoE":
            node.attribute.append(onnx.helper.make_attribute("accuracy_level", LEVEL))
    onnx.save(graph, path)


def same_products(package: Path, other: Path, group: int) -> None:
    """Stop where two packages do not have all products in codes in groups of ``group``: options can be passed over."""
    for folder in (package, other):
        (path,) = folder.glob("*.onnx")
        nodes = onnx.load(path, load_external_data=False).graph.node
        blocks = {a.i for node in nodes for a in node.attribute if a.name == "block_size"}
        if blocks != {group}:
            raise SystemExit(f"{path}: groups of {sorted(blocks)}, expected {group} alone: nothing to compare")


def _folder(work: Path, name: str) -> Path:
    return work / name.replace(",", "").replace("'", "").replace(" ", "-")


def limit_threads(package: Path, threads: int) -> None:
    """Have onnxruntime-genai use so many."""
    path = package / "genai_config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


def timed(command: list[Any], threads: int, path: Path = ROOT) -> dict[str, float]:
    """Run a program that prints rates, with ``path`` before its modules."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(path)}
    done = subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True, env=env)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def bandwidth(threads: int) -> float:
    """Bytes a second that the processors read from memory: the best of five sums over a gigabyte."""
    torch.set_num_threads(threads)
    numbers = torch.ones(1 << 27, dtype=torch.int64)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        numbers.sum()
        best = max(best, numbers.nbytes / (time.perf_counter() - start))
    return best


def active_bytes(package: Path, source: Path) -> int:
    """What one token must read of our weights: of the experts those that it chooses, of the embedding one row."""
    text = ModelConfig.from_file(source / "config.json").text
    tensors = json.loads((package / "manifest.json").read_text(encoding="utf-8"))["tensors"]
    sizes = {"F32": 4, "U8": 1}
    total = 0
    for name, tensor in tensors.items():
        nbytes = sizes[tensor["dtype"]]
        for size in tensor["shape"]:
            nbytes *= size
        if "embed_tokens" not in name:
            total += nbytes * text.num_experts_per_tok // text.num_experts if ".experts." in name else nbytes
    return total


def say(text: str) -> None:
    """What goes on, beside the tables."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Parse, prepare, time, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path, help="folder for checkpoint and packages, 6 GB; what is there is kept")
    parser.add_argument("--demo", action="store_true", help="the demo checkpoint, not random layers of real shape")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--genai-python", type=Path, default=ROOT / ".venv-genai" / "bin" / "python")
    parser.add_argument("--vllm-python", type=Path, default=ROOT / ".venv-vllm" / "bin" / "python")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="lines whose name has one of these words in it")
    parser.add_argument("--prepare", action="store_true", help="make checkpoint and packages, and time nothing")
    parser.add_argument("--json", type=Path, help="write every number to this file")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    prepare(options.work, options.genai_python, demo=options.demo)
    if options.prepare:
        return
    packages = [*OURS, GENAI, LEVELLED]
    for name in packages:
        limit_threads(_folder(options.work, name), options.threads)
    everybody = (*packages, TRANSFORMERS, VLLM)
    rates: dict[str, dict[str, float]] = {
        name: {} for name in everybody if not options.only or any(word in name for word in options.only)
    }
    for number in range(options.rounds):
        for prompt in PROMPTS:
            for name in rates:
                if name == VLLM and number:
                    continue
                say(f"round {number + 1} of {options.rounds}, prompt {prompt}: {name}")
                if name == TRANSFORMERS:
                    program = [sys.executable, HERE / "packages" / "transformers_rates.py", options.work / "source"]
                    tail = [prompt, NEW, REPEATS, options.threads]
                elif name == VLLM:
                    program = [options.vllm_python, HERE / "packages" / "vllm_rates.py", options.work / "source"]
                    tail = [prompt, NEW, REPEATS]
                else:
                    program = [
                        options.genai_python, HERE / "packages" / "genai_rates.py", _folder(options.work, name)
                    ]  # fmt: skip
                    tail = [prompt, NEW, REPEATS]
                found = timed([*program, *tail], options.threads, VLLM_SHIM if name == VLLM else ROOT)
                for key, rate in ((f"prefill {prompt}", prompt / found["prefill"]), ("decode", NEW / found["decode"])):
                    rates[name][key] = max(rate, rates[name].get(key, 0.0))
    speed = bandwidth(options.threads)
    keys = [*(f"prefill {prompt}" for prompt in PROMPTS), "decode"]
    print("| tokens a second | " + " | ".join(keys) + " | limit of memory | reached |")
    print("|---|" + "---:|" * (len(keys) + 2))
    for name, found in rates.items():
        limit = speed / active_bytes(_folder(options.work, name), options.work / "source") if name in OURS else None
        share = ("", "") if limit is None else (f"{limit:.0f}", f"{found['decode'] / limit:.0%}")
        print(f"| {name} | " + " | ".join([*(f"{found[key]:.1f}" for key in keys), *share]) + " |")
    print(f"\nMemory read with {options.threads} threads: {speed / 1e9:.1f} GB/s.")
    if options.json is not None:
        options.json.write_text(json.dumps({"rates": rates, "bandwidth": speed}, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
