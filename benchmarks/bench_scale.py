"""Measure how the cost of a conversion grows with the checkpoint, and write the page that tells of it.

    python benchmarks/bench_scale.py measure docs/scale.json [--work FOLDER] [--quick]
    python benchmarks/bench_scale.py page docs/scale.json [--check] [--plot]

``measure`` converts 1, 2, 4 and 8 layers of the shapes of 35B-A3B, plans 35B, 122B and 397B from headers over holes,
and converts many tiny matrices; everything as whole processes, one after the other. The input is dropped from the page
cache before each conversion. It takes some ten minutes and at most 23 GB of disk. ``page`` writes tables into
docs/scale.md; ``--plot`` also the picture, for which it needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from comparison.floor import fsync_folder
from comparison.process import Taken, failure, run
from scale.growth import Conversion, Planning

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "scale.md"
PROGRAM = Path(sys.executable).with_name("qconvert")
SCHEME = ("--scheme", "int4", "--group", "128")
HUB_SHARD_BYTES = 4_000_000_000
TIMEOUT = 3600.0


def say(text: str) -> None:
    """Progress goes to the error stream."""
    print(text, file=sys.stderr, flush=True)


def measured(command: Sequence[str], work: Path) -> Taken:
    """Run a whole process.

    Raises:
        SystemExit: it failed; says why.
    """
    taken = run(command, env=dict(os.environ), log=work / "log", timeout=TIMEOUT)
    reason = failure(taken)
    if reason is not None:
        raise SystemExit(f"{' '.join(command)}: {reason}")
    return taken


def make(out: Path, *options: str) -> None:
    """Make a synthetic checkpoint, in a process of its own: the memory of this one is a floor under what it starts."""
    shutil.rmtree(out, ignore_errors=True)
    subprocess.run([sys.executable, str(HERE / "make_synthetic.py"), str(out), *options], check=True, stdout=2)


def forget(folder: Path) -> None:
    """Write out what is dirty and drop the weights in ``folder`` from the page cache."""
    os.sync()
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def weights(folder: Path) -> int:
    """Bytes of the files with weights."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def convert(size: str, layers: int, work: Path) -> Conversion:
    """Make a checkpoint, convert it, time the disk alone, and remove everything."""
    source, out, floor = work / "source", work / "out", work / "floor"
    make(source, "--size", size, "--layers", str(layers))
    forget(source)
    taken = measured([str(PROGRAM), "quantize", str(source), str(out), *SCHEME, "--json"], work)
    decisions = json.loads((work / "log").read_text(encoding="utf-8"))["decisions"]
    before, after = weights(source), weights(out)
    shutil.rmtree(out)
    forget(source)
    alone = measured([sys.executable, str(HERE / "comparison" / "floor.py"), str(source), str(floor), str(after)], work)
    floor.unlink()
    shutil.rmtree(source)
    fsync_folder(work)
    done = Conversion(
        layers=layers,
        steps=sum(one["tensors"] for one in decisions),
        input_bytes=before,
        output_bytes=after,
        wall=taken.wall,
        cpu=taken.cpu,
        peak_rss=taken.peak_rss,
        disk_read=taken.disk_read,
        disk_written=taken.disk_written,
        floor=json.loads(alone.last_words)["seconds"],
    )
    say(f"{size}, {layers} layers: {done.wall:.1f} s, floor {done.floor:.1f} s, {done.peak_rss / 1e6:.0f} MB")
    return done


def plans(size: str, work: Path, *options: str) -> Iterator[Planning]:
    """Plan a checkpoint of holes, with the result as a table and as JSON."""
    source = work / "source"
    make(source, "--size", size, "--layers", "0", "--mtp", "--vision", "--holes", *options)
    steps = 0
    for printed in (("--json",), ()):
        taken = measured(
            [str(PROGRAM), "quantize", str(source), str(work / "out"), *SCHEME, "--dry-run", *printed], work
        )
        if printed:
            with (work / "log").open(encoding="utf-8") as log:  # larger than this process should become
                steps = sum('"peak_bytes":' in line for line in log)
        done = Planning(
            size=size,
            per_expert="--per-expert" in options,
            shards=len(list(source.glob("*.safetensors"))),
            steps=steps,
            json=bool(printed),
            wall=taken.wall,
            peak_rss=taken.peak_rss,
        )
        say(f"plan of {size} {' '.join(options)} {' '.join(printed)}: {done.wall:.1f} s, {done.peak_rss / 1e6:.0f} MB")
        yield done
    shutil.rmtree(source)


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "system": platform.system(),
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_before": os.getloadavg()[0],
    }


def measure(work: Path, *, quick: bool) -> dict[str, Any]:
    """Everything that the page tells, as plain JSON."""
    about = machine()
    size, sizes = ("tiny", ["tiny"]) if quick else ("35b-a3b", ["35b-a3b", "122b-a10b", "397b-a17b"])
    hub = ("--shard-bytes", str(HUB_SHARD_BYTES))
    convert("tiny", 1, work)  # compiled kernels and libraries lie in their caches after it
    bare = measured([str(PROGRAM), "quantize", "--help"], work)
    return {
        "machine": about,
        "size": size,
        "bare": {"wall": bare.wall, "peak_rss": bare.peak_rss},
        "plans": [
            asdict(plan)
            for options in (
                *((each, *hub) for each in sizes),
                (sizes[0], "--shard-bytes", str(HUB_SHARD_BYTES // 8)),
                (sizes[-1], *hub, "--per-expert"),
            )
            for plan in plans(options[0], work, *options[1:])
        ],
        "many": [asdict(convert("tiny" if quick else "many", layers, work)) for layers in (2, 12)],
        "conversions": [asdict(convert(size, layers, work)) for layers in (1, 2, 4, 8)],
    }


def main() -> int:
    """Parse, and measure or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure", help="measure and write the numbers as JSON")
    measuring.add_argument("numbers", type=Path)
    measuring.add_argument("--work", type=Path, default=Path(), help="folder on the disk to measure; default: here")
    measuring.add_argument("--quick", action="store_true", help="tiny shapes, to see that everything runs")
    writing = commands.add_parser("page", help="write tables, and the plot, from the numbers")
    writing.add_argument("numbers", type=Path)
    writing.add_argument("--check", action="store_true", help="write nothing; exit 1 when the page is not current")
    writing.add_argument("--plot", action="store_true", help="draw the picture too; needs matplotlib")
    options = parser.parse_args()
    if options.command == "measure":
        work = Path(tempfile.mkdtemp(prefix="bench-scale-", dir=options.work))
        try:
            numbers = measure(work, quick=options.quick)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        options.numbers.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
        return 0
    from scale.page import page  # torch comes with it: nothing that is measured is started from so large a process
    from scale.plot import draw

    numbers = json.loads(options.numbers.read_text(encoding="utf-8"))
    text = PAGE.read_text(encoding="utf-8")
    if options.check:
        return int(page(text, numbers) != text)
    PAGE.write_text(page(text, numbers), encoding="utf-8")
    if options.plot:
        draw(numbers, PAGE.with_suffix(".svg"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
