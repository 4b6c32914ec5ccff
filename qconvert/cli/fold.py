"""`qconvert fold` and `qconvert unfold`: the shared expert as further routed experts, and back."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Annotated

import typer

from qconvert.carry_out import Conversion
from qconvert.cli import console
from qconvert.cli.options import (
    PROCESSORS,
    DryRun,
    FoldEngine,
    Fresh,
    HashName,
    Jobs,
    Json,
    MaxMemory,
    MaxShardSize,
    ReadBack,
    check_fold_engine,
    parse_hash,
    parse_size,
)
from qconvert.cli.planned import limits, preview, show_plan
from qconvert.convert import plan_refolding, refold
from qconvert.core.plan import Folding
from qconvert.io.hub import resolve

Source = Annotated[str, typer.Argument(metavar="SRC", help="Folder of a checkpoint, or a hub id ORG/NAME.")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="New folder; it appears whole or not at all.")]


def fold(
    source: Source,
    out: Out,
    engine: FoldEngine = None,
    dry_run: DryRun = False,
    jobs: Jobs = PROCESSORS,
    max_memory: MaxMemory = "1GiB",
    fresh: Fresh = False,
    read_back: ReadBack = True,
    max_shard_size: MaxShardSize = "5GB",
    algorithm: HashName = "xxh3-128",
    json: Json = False,
) -> None:
    """Store the shared expert as further routed experts that every token visits.

    For graphs with one kernel for all experts, as `export-onnx` writes them: it takes a folded checkpoint, and folds by
    itself with --fold-shared-expert.
    A shared expert that is wider than a routed one becomes several; of other widths the last is filled up with zeros.
    Nothing is rounded: weights, or codes and scales, move, and what the model computes stays the same but for the order
    of sums. Both have to be stored alike: `qconvert quantize --preset fusable`. transformers, vLLM and SGLang read the
    shared expert by its own name, so this is for --engine onnxruntime alone. MTP layers fold too. `qconvert unfold`
    undoes it, bit for bit.

    Examples:
      qconvert fold ./Qwen3.5-35B-A3B ./folded --engine onnxruntime

      qconvert quantize ./Qwen3.5-35B-A3B ./folded-int4 --preset fusable --fold-shared-expert --engine onnxruntime
    """

    def call() -> int:
        check_fold_engine(engine)
        return _refold(
            source, out, Folding.FOLDED, dry_run=dry_run, jobs=jobs, max_memory=max_memory,
            fresh=fresh, read_back=read_back,
            max_shard_size=max_shard_size, algorithm=algorithm, json=json,
        )  # fmt: skip

    raise typer.Exit(console.guarded(call))


def unfold(
    source: Source,
    out: Out,
    dry_run: DryRun = False,
    jobs: Jobs = PROCESSORS,
    max_memory: MaxMemory = "1GiB",
    fresh: Fresh = False,
    read_back: ReadBack = True,
    max_shard_size: MaxShardSize = "5GB",
    algorithm: HashName = "xxh3-128",
    json: Json = False,
) -> None:
    """Give a folded shared expert its own place and name again, bit for bit and code for code.

    Example:
      qconvert unfold ./folded ./Qwen3.5-35B-A3B
    """

    def call() -> int:
        return _refold(
            source, out, Folding.UNFOLDED, dry_run=dry_run, jobs=jobs, max_memory=max_memory,
            fresh=fresh, read_back=read_back,
            max_shard_size=max_shard_size, algorithm=algorithm, json=json,
        )  # fmt: skip

    raise typer.Exit(console.guarded(call))


def _refold(
    source: str,
    out: Path,
    folding: Folding,
    *,
    dry_run: bool,
    jobs: int,
    max_memory: str,
    fresh: bool,
    read_back: bool,
    max_shard_size: str,
    algorithm: str,
    json: bool,
) -> int:
    limit, shard_bytes, hashes = parse_size(max_memory), parse_size(max_shard_size), parse_hash(algorithm)
    folder = resolve(source)
    if dry_run:
        preview(plan_refolding(folder, folding, max_memory=limit, shard_bytes=shard_bytes), out, json=json)
        return 0
    start = time.perf_counter()
    with console.progress(in_bytes=True, quiet=json) as advance:
        done = refold(
            folder, out, folding, jobs=jobs, max_memory=limit, shard_bytes=shard_bytes,
            fresh=fresh, read_back=read_back,
            algorithm=hashes, progress=lambda now, total: advance("moving", now, total),
        )  # fmt: skip
    _report(done, folder, folding, time.perf_counter() - start, json=json)
    return 0


def _report(done: Conversion, source: Path, folding: Folding, seconds: float, *, json: bool) -> None:
    if json:
        console.show_json(
            {
                "out": str(done.out),
                "shared_expert": folding.value,
                "bytes_before": done.bytes_before,
                "bytes_after": done.bytes_after,
                "seconds": round(seconds, 3),
                **{key: done.record[key] for key in ("source_hash", "policy_hash", "decisions")},
                "engine_limits": limits(done.plan),
            }
        )
        return
    show_plan(done.plan)
    sizes = f"{console.gigabytes(done.bytes_before)} -> {console.gigabytes(done.bytes_after)}"
    console.say(f"{sizes} in {seconds:.1f} s: {done.out}")
    console.say(f"Next: {shlex.join(['qconvert', 'parity', str(source), str(done.out)])}")
