"""Time `qconvert quantize --method gptq` beside llm-compressor's GPTQ, as whole processes on the same tokens.

    bash benchmarks/peers/setup.sh llm-compressor
    python benchmarks/bench_calibrated.py [SOURCE] [--tokens 16384] [--peer none] [--json FILE]
    python benchmarks/bench_calibrated.py SOURCE --methods awq-none,awq --scheme int4-all --peer none

Other methods of qconvert and other schemes are those of bench_quality.py, by its names.

SOURCE is the demo checkpoint by default; one of ``make_synthetic.py`` has the layer shapes of a public size. Token ids
are drawn uniformly, so that a checkpoint needs no tokenizer, and both get the same windows. What is measured has in it
all that a user waits for: imports, every forward pass, reading and writing. bench_quality.py tells of losses.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from comparison.candidates import versions
from comparison.experts import experts_found, routed_expert_weights, stored_in
from comparison.methods import MEASURE, SCHEMES, WIDER, Method, Text, our_methods, peer_methods
from comparison.process import Taken, failure, run

HERE = Path(__file__).parent
DEMO = HERE.parent / "reference_model" / "demo"
PEER = "llm-compressor"
FAILED = "failed"
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
_DRAW = (
    "import sys, numpy as n; n.save(sys.argv[1], n.random.default_rng(0).integers(0, {vocabulary}, ({rows}, {width})))"
)


def draw_ids(path: Path, vocabulary: int, tokens: int, window: int) -> None:
    """Write int64 [W, T] in a process of its own, the same for the same arguments: this one stays small."""
    command = _DRAW.format(vocabulary=vocabulary, rows=tokens // window, width=window)
    taken = run([sys.executable, "-c", command, str(path)], env=os.environ, log=path.with_suffix(".log"), timeout=60)
    if reason := failure(taken):
        raise SystemExit(f"no token ids: {reason}")


def text_config(source: Path) -> dict[str, Any]:
    """That of the decoder."""
    config: dict[str, Any] = json.loads((source / "config.json").read_text(encoding="utf-8"))
    return {**config, **config.get("text_config", {})}


def measure(
    method: Method, source: Path, work: Path, scheme: str, env: dict[str, str], timeout: float
) -> tuple[Taken, str]:
    """Convert once; what it took, and how the experts of its output are stored or why there is none."""
    out = work / method.key
    taken = run(method.command(source, out, scheme), env=env, log=work / "log", timeout=timeout)
    reason = failure(taken)
    try:
        said = f"{FAILED}: {reason}" if reason else str(experts_found(stored_in(source), stored_in(out)))
    except ValueError as error:
        said = f"{FAILED}: {error}"
    shutil.rmtree(out, ignore_errors=True)
    return taken, said


def table(titles: Sequence[str], taken: Sequence[Taken], stored: Sequence[str], experts: int) -> str:
    """Markdown: a line each, and how many times what the first took the others take."""
    lines = ["| | wall s | CPU s | CPU s an expert | peak RSS | experts rounded |", "|---|---:|---:|---:|---:|---|"]
    for title, one, said in zip(titles, taken, stored, strict=True):
        each = f"{one.cpu / experts:.2f}"
        lines.append(f"| {title} | {one.wall:.1f} | {one.cpu:.1f} | {each} | {one.peak_rss / 1e9:.2f} GB | {said} |")
    first = taken[0]
    for title, one, said in zip(titles[1:], taken[1:], stored[1:], strict=True):
        if said.startswith(FAILED) or stored[0].startswith(FAILED):
            continue
        lines.append(
            f"\n{title} takes {one.wall / first.wall:.1f} times the wall time, {one.cpu / first.cpu:.1f} times the CPU "
            f"seconds and {one.peak_rss / first.peak_rss:.1f} times the memory."
        )
    return "\n".join(lines)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, nargs="?", default=DEMO)
    parser.add_argument("--tokens", type=int, default=16_384, help="default: %(default)s")
    parser.add_argument("--window", type=int, default=512, help="default: %(default)s")
    parser.add_argument("--methods", default=MEASURE, help="qconvert's, with commas between them; default: %(default)s")
    parser.add_argument("--scheme", choices=(*SCHEMES, *WIDER), default=SCHEMES[0], help="default: %(default)s")
    parser.add_argument("--peer", choices=(PEER, "none"), default=PEER)
    parser.add_argument("--peer-folder", type=Path, default=HERE / ".peers", help="where peers/setup.sh put them")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="folder for outputs; default: beside SOURCE")
    parser.add_argument("--timeout", type=float, default=7200, help="seconds that one conversion may take")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    source = asked.source.resolve()
    config = text_config(source)
    experts = config["num_hidden_layers"] * config["num_experts"]
    if not routed_expert_weights(stored_in(source)):
        parser.error(f"{source} has no routed experts; make a checkpoint with benchmarks/make_synthetic.py")
    env = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(asked.threads)), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory(prefix="bench-calibrated-", dir=asked.work or source.parent) as folder:
        work = Path(folder)
        ids = work / "ids.npy"
        draw_ids(ids, config["vocab_size"], asked.tokens, asked.window)
        given = ("--text", f"ids={ids}", "--tokens", str(asked.tokens), "--window", str(asked.window))
        text = Text(ids=ids, options=given)
        ours = {one.key: one for one in our_methods(asked.threads, text) if one.before is None}
        wanted = asked.methods.split(",")
        if not {*wanted} <= {*ours}:
            parser.error(f"--methods {asked.methods}: expected names out of {', '.join(ours)}")
        peers = [one for one in peer_methods(asked.peer_folder.absolute(), text, ids) if one.key == asked.peer]
        methods = [*(ours[key] for key in wanted), *peers]
        if strange := [one.title for one in methods if asked.scheme not in one.schemes]:
            parser.error(f"--scheme {asked.scheme}: {', '.join(strange)} is not measured in it")
        try:
            found = [versions(method, env) for method in methods]
        except ValueError as error:
            parser.error(str(error))
        done = [measure(method, source, work, asked.scheme, env, asked.timeout) for method in methods]
    titles = [f"{one.title} {found[n][one.packages[0]]}" for n, one in enumerate(methods)]
    taken, stored = [one for one, _ in done], [said for _, said in done]
    print(f"{source.name}: {experts} experts, {asked.scheme}, {asked.tokens:,} tokens, {asked.threads} threads, load "
          f"{os.getloadavg()[0]:.1f}\n")  # fmt: skip
    print(table(titles, taken, stored, experts))
    if asked.json is not None:
        document = [{"title": titles[n], "versions": found[n], **asdict(one)} for n, one in enumerate(taken)]
        asked.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 1 if any(said.startswith(FAILED) for said in stored) else 0


if __name__ == "__main__":
    sys.exit(main())
