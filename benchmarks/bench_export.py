"""Time `qconvert export-onnx` beside onnxruntime-genai's builder, as whole processes on the same BF16 checkpoint.

    bash tests/engines/setup.sh
    python benchmarks/make_synthetic.py wide
    python benchmarks/bench_export.py wide [--rounds 2] [--json FILE]

Both round to int4 in groups of 128 what the builder rounds (router and shared-expert gate it rounds as well). A third
line rounds the routed experts alone, a fourth nothing and stores BF16. All run on the same two processors, on a folder
that was read before; the builder's output, which it does not fsync, is fsynced here and the time added. It loads the
whole model: on less than 24 GB give it a smaller checkpoint than two real layers with the real vocabulary.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench_quantize import DEMO, HERE, fsync_tree, machine, pin, say
from comparison.floor import read_all
from comparison.process import Taken, failure, run

GROUP = "128"
LIKE_GENAI = str(HERE / "packages" / "like_genai.toml")
OURS = {
    "qconvert, int4 as the builder": ("--scheme", "int4", "--group", GROUP, "--policy", LIKE_GENAI),
    "qconvert, int4 experts": ("--scheme", "int4", "--group", GROUP),
    "qconvert, nothing rounded, bfloat16": ("--dtype", "bfloat16"),
}
GENAI = "onnxruntime-genai's builder, int4"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "generation_config.json")
TIMEOUT = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """One run.

    Attributes:
        wall: seconds, the fsync of the output included.
        bytes: of all files of the package.
        failed: why there is none.
    """

    who: str
    wall: float
    cpu: float
    peak_rss: int
    bytes: int
    failed: str | None


def commands(source: Path, out: Path, cache: Path, genai: Path | None) -> dict[str, Sequence[str]]:
    """Everybody's command."""
    ours = str(Path(sys.executable).with_name("qconvert"))
    found: dict[str, Sequence[str]] = {
        who: (ours, "export-onnx", str(source), str(out), *options, "--jobs", "2", "--json")
        for who, options in OURS.items()
    }
    if genai is not None:
        builder = (str(genai), "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(out))
        extra = ("--extra_options", f"block_size={GROUP}", f"qmoe_block_size={GROUP}", "accuracy_level=4")
        found[GENAI] = (*builder, "-p", "int4", "-e", "cpu", "-c", str(cache), *extra)
    return found


def export(who: str, command: Sequence[str], source: Path, out: Path, log: Path) -> Export:
    """Run one of them on a folder that lies in the page cache, and remove what it wrote."""
    read_all(sorted(source.glob("*.safetensors")))
    env = {**os.environ, "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    taken: Taken = run(command, env=env, log=log, timeout=TIMEOUT)
    failed = failure(taken)
    wall, cpu = (0.0, 0.0) if failed or who in OURS else fsync_tree(out)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) if out.exists() else 0
    shutil.rmtree(out, ignore_errors=True)
    return Export(
        who=who, wall=taken.wall + wall, cpu=taken.cpu + cpu, peak_rss=taken.peak_rss, bytes=size, failed=failed
    )


def main() -> int:
    """Parse, run, print the best of all rounds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, help="folder of a BF16 checkpoint")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--work", type=Path, help="where packages go, each removed at once; default: beside the source")
    parser.add_argument("--genai-python", type=Path, default=HERE.parent / ".venv-genai" / "bin" / "python")
    parser.add_argument("--no-genai", action="store_true", help="qconvert alone")
    parser.add_argument("--json", type=Path, help="write every run to this file")
    options = parser.parse_args()
    processors = pin(2)
    runs: list[Export] = []
    with tempfile.TemporaryDirectory(dir=options.work or options.source.resolve().parent) as folder:
        work = Path(folder)
        source = work / "source"  # with a tokenizer, which the builder wants to see
        source.mkdir()
        for path in (*options.source.resolve().iterdir(), *(DEMO / name for name in TOKENIZER)):
            if not (source / path.name).exists():
                (source / path.name).symlink_to(path)
        genai = None if options.no_genai else options.genai_python
        for number in range(options.rounds):
            for who, command in commands(source, work / "out", work / "cache", genai).items():
                runs.append(export(who, command, source, work / "out", work / "log"))
                say(f"round {number + 1} of {options.rounds}, {who}: {runs[-1].failed or f'{runs[-1].wall:.1f} s'}")
    print("| | wall | CPU | peak RSS | package |")
    print("|---|---:|---:|---:|---:|")
    for who in dict.fromkeys(one.who for one in runs):
        mine = [one for one in runs if one.who == who]
        best = min(mine, key=lambda one: one.wall)
        if best.failed:
            print(f"| {who} | {best.failed} | | {best.peak_rss / 1e9:.2f} GB | |")
            continue
        peak = max(one.peak_rss for one in mine)
        print(f"| {who} | {best.wall:.1f} s | {best.cpu:.1f} s | {peak / 1e9:.2f} GB | {best.bytes / 1e9:.2f} GB |")
    if options.json is not None:
        told = {"machine": machine(2, processors, cold=False), "runs": [asdict(run) for run in runs]}
        options.json.write_text(json.dumps(told, indent=2), encoding="utf-8")
    return 1 if any(run.failed for run in runs) else 0


if __name__ == "__main__":
    sys.exit(main())
