"""Time `qconvert quantize` beside the disk itself and beside other quantizers, as whole processes in one run.

    bash benchmarks/peers/setup.sh
    python benchmarks/make_synthetic.py wide
    python benchmarks/bench_quantize.py wide [--rounds 3] [--json FILE]

For every scheme a round runs qconvert, then the floor (reading the input while as many bytes as qconvert's output has
are written and fsynced, and nothing else), then qconvert again without reading back what it wrote, as peers do not
either, then every peer that has the scheme. All run on the same two processors with as many threads, on the same
folder, which is read once before each so that it lies in the page cache (``--cold`` drops it instead). Outputs of
peers, which do not fsync, are fsynced by this program and the time is added. Each output's headers are looked at for
routed experts in fewer bits, then it is removed: at most one lies on the disk at a time.

Every candidate converts the small demo checkpoint once before, untimed, so that compiled kernels and libraries lie in
their caches. Imports are timed apart and are part of the wall time as well.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from comparison.candidates import PEER_KEYS, SCHEMES, Candidate, ours, peers, versions
from comparison.experts import Stored, experts_found, stored_in
from comparison.floor import fsync_folder, read_all
from comparison.process import Taken, failure, run
from comparison.results import FLOOR, OURS, Run, leads, markdown, rows

HERE = Path(__file__).parent
DEMO = HERE.parent / "reference_model" / "demo"
THREAD_VARIABLES = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS", "NUMEXPR_NUM_THREADS",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Stand:
    """What stays the same through a whole run.

    Attributes:
        source: the folder that everybody converts.
        tensors: what it holds.
        work: where outputs and logs go.
        cold: drop the input from the page cache instead of reading it into the cache.
        keep: leave the outputs of the last round.
    """

    source: Path
    tensors: list[Stored]
    work: Path
    env: dict[str, str]
    timeout: float
    cold: bool
    keep: bool

    @property
    def files(self) -> list[Path]:
        """The input's weights."""
        return sorted(self.source.glob("*.safetensors"))

    @property
    def input_bytes(self) -> int:
        """Of all its weights."""
        return sum(path.stat().st_size for path in self.files)

    def process(self, command: Sequence[str]) -> Taken:
        """Run a command of this stand as a whole process."""
        return run(command, env=self.env, log=self.work / "log", timeout=self.timeout)


def say(text: str) -> None:
    """Progress goes to the error stream; results alone go to the output."""
    print(text, file=sys.stderr, flush=True)


def settle(stand: Stand) -> None:
    """Bring page cache and disk to the state that every run starts from."""
    os.sync()
    if not stand.cold:
        read_all(stand.files)
        return
    for path in stand.files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def time_floor(stand: Stand, scheme: str, nbytes: int, round_number: int) -> Run:
    """Read the input while ``nbytes`` bytes are written and fsynced."""
    out = stand.work / "floor"
    settle(stand)
    taken = stand.process(
        [sys.executable, str(HERE / "comparison" / "floor.py"), str(stand.source), str(out), str(nbytes)]
    )
    out.unlink(missing_ok=True)
    reason = failure(taken)
    return Run(
        candidate=FLOOR,
        scheme=scheme,
        round=round_number,
        # an interpreter's start is no part of what the disk needs
        wall=json.loads(taken.last_words)["seconds"] if reason is None else 0.0,
        cpu=taken.cpu,
        peak_rss=taken.peak_rss,
        output_bytes=nbytes,
        failure=reason,
    )


def time_candidate(stand: Stand, candidate: Candidate, scheme: str, round_number: int, *, keep: bool = False) -> Run:
    """Convert once, fsync what is not yet, look at the experts, and remove the output."""
    out = stand.work / f"{candidate.key}-{scheme}"
    shutil.rmtree(out, ignore_errors=True)
    settle(stand)
    try:
        taken = stand.process(candidate.command(stand.source, out, scheme))
    except OSError as error:
        return Run(candidate=candidate.key, scheme=scheme, round=round_number, failure=f"cannot start: {error}")
    reason = failure(taken)
    fsync = fsync_cpu = 0.0
    experts, quantized, nbytes = "", False, 0
    if reason is None:
        if not candidate.fsyncs:
            fsync, fsync_cpu = fsync_tree(out)
        try:
            found = experts_found(stand.tensors, stored_in(out))
            experts, quantized = str(found), found.quantized
            nbytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        except ValueError as error:
            reason = f"no checkpoint came out: {error}"
    if not keep:
        shutil.rmtree(out, ignore_errors=True)
    return Run(
        candidate=candidate.key,
        scheme=scheme,
        round=round_number,
        wall=taken.wall + fsync,
        fsync=fsync,
        cpu=taken.cpu + fsync_cpu,
        peak_rss=taken.peak_rss,
        output_bytes=nbytes,
        experts=experts,
        quantized=quantized,
        failure=reason,
    )


def fsync_tree(folder: Path) -> tuple[float, float]:
    """Make every file and folder below ``folder`` lasting; wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        else:
            fsync_folder(path)
    fsync_folder(folder)
    fsync_folder(folder.parent)
    return time.perf_counter() - wall, time.process_time() - cpu


def warm_up(stand: Stand, candidates: Sequence[Candidate], schemes: Sequence[str]) -> None:
    """Let every candidate convert the demo once: what it compiles and reads from disk then lies in its caches."""
    for candidate in candidates:
        for scheme in candidate.schemes:
            if scheme in schemes:
                say(f"warming up: {candidate.title}, {scheme}")
                out = stand.work / "warm-up"
                stand.process(candidate.command(DEMO, out, scheme))
                shutil.rmtree(out, ignore_errors=True)


def compare(
    stand: Stand, candidates: Sequence[Candidate], schemes: Sequence[str], rounds: int, runs: list[Run]
) -> dict[str, list[float]]:
    """Fill ``runs`` round by round and return each candidate's seconds of imports."""
    imports: dict[str, list[float]] = {}
    for number in range(1, rounds + 1):
        for candidate in candidates:
            taken = stand.process([str(candidate.python), "-c", candidate.imports])
            if failure(taken) is None:
                imports.setdefault(candidate.key, []).append(taken.wall)
        for scheme in schemes:
            for candidate in candidates:
                if scheme not in candidate.schemes:
                    continue
                done = time_candidate(stand, candidate, scheme, number, keep=stand.keep and number == rounds)
                _record(runs, done, rounds)
                if candidate.key == OURS and done.failure is None:
                    _record(runs, time_floor(stand, scheme, done.output_bytes, number), rounds)
    return imports


def _record(runs: list[Run], done: Run, rounds: int) -> None:
    runs.append(done)
    said = f"failed: {done.failure}" if done.failure else f"{done.wall:.2f} s, {done.cpu:.1f} CPU s"
    say(f"round {done.round} of {rounds}, {done.scheme}, {done.candidate}: {said}")


def pin(threads: int) -> list[int]:
    """Keep this process and what it starts on ``threads`` processors; none are named where the system cannot."""
    if not hasattr(os, "sched_setaffinity"):
        return []
    chosen = sorted(os.sched_getaffinity(0))[:threads]
    os.sched_setaffinity(0, chosen)
    return chosen


def usable(candidates: Sequence[Candidate], env: dict[str, str]) -> tuple[list[Candidate], dict[str, Any], list[str]]:
    """Those whose environments are there, all versions, and a sentence for each that is missing."""
    present, found, missing = [], {}, []
    for candidate in candidates:
        try:
            found[candidate.key] = versions(candidate, env)
            present.append(candidate)
        except ValueError as error:
            missing.append(f"{candidate.title}: failed: {error}")
    return present, found, missing


def machine(threads: int, processors: Sequence[int], *, cold: bool) -> dict[str, Any]:
    """What the numbers were measured on."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {
        "system": platform.platform(),
        "processor": model,
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "pinned_to": list(processors),
        "threads": threads,
        "page_cache": "cold" if cold else "warm",
        "load_before": os.getloadavg()[0],
    }


def arguments() -> argparse.Namespace:
    """The command line, checked as far as it goes alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of a BF16 checkpoint with routed experts")
    parser.add_argument("--schemes", default=",".join(SCHEMES), help="default: %(default)s")
    parser.add_argument("--peers", default=",".join(PEER_KEYS), help="default: %(default)s; 'none' for none")
    parser.add_argument("--peer-folder", type=Path, default=HERE / ".peers", help="where peers/setup.sh put them")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="folder for outputs, on the disk to measure; default: beside SOURCE")
    parser.add_argument("--cold", action="store_true", help="drop the input from the page cache before each run")
    parser.add_argument("--keep", action="store_true", help="leave the outputs of the last round, all of them")
    parser.add_argument("--no-warm-up", action="store_true", help="do not convert the demo first")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds that one conversion may take")
    parser.add_argument("--json", type=Path, help="write every run and row to this file")
    options = parser.parse_args()
    options.schemes = _chosen(parser, options.schemes, SCHEMES, "--schemes")
    options.peers = [] if options.peers == "none" else _chosen(parser, options.peers, PEER_KEYS, "--peers")
    if options.rounds < 1 or options.threads < 1:
        parser.error("--rounds and --threads should be 1 or more")
    if options.cold and not hasattr(os, "posix_fadvise"):
        parser.error("--cold needs posix_fadvise, which this system does not have")
    try:
        options.tensors = stored_in(options.source)
        experts_found(options.tensors, ())
    except ValueError as error:
        parser.error(f"{error}; make a checkpoint with benchmarks/make_synthetic.py")
    parent = options.work or options.source.resolve().parent
    if not os.access(parent, os.W_OK):
        parser.error(f"{parent} is no folder that can be written to; choose one on the disk to measure with --work")
    needed, free = (
        sum(path.stat().st_size for path in options.source.glob("*.safetensors")),
        shutil.disk_usage(parent).free,
    )
    if free < needed:
        parser.error(f"{parent} has {free / 1e9:.1f} GB free, an output may take {needed / 1e9:.1f} GB; see --work")
    options.work = parent
    return options


def _chosen(parser: argparse.ArgumentParser, text: str, known: Sequence[str], option: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or not set(names) <= set(known):
        parser.error(f"{option} {text!r}: expected names out of {', '.join(known)}, with commas between them")
    return names


def main() -> int:
    """Parse, measure, print."""
    options = arguments()
    processors = pin(options.threads)
    env = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(options.threads))}
    wanted = [
        ours(options.threads),
        ours(options.threads, read_back=False),
        *(each for each in peers(options.peer_folder.absolute()) if each.key in options.peers),
    ]
    candidates, found, missing = usable(wanted, env)
    folder = Path(tempfile.mkdtemp(prefix="bench-quantize-", dir=options.work))
    stand = Stand(
        source=options.source.resolve(), tensors=options.tensors, work=folder, env=env, timeout=options.timeout,
        cold=options.cold, keep=options.keep,
    )  # fmt: skip
    about = machine(options.threads, processors, cold=options.cold)
    runs: list[Run] = []
    try:
        if not options.no_warm_up:
            warm_up(stand, candidates, options.schemes)
        imports = compare(stand, candidates, options.schemes, options.rounds, runs)
    except KeyboardInterrupt:
        say("interrupted; nothing is reported")
        return 130
    finally:
        if options.keep:
            say(f"outputs of the last round: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    table = rows(runs, stand.input_bytes, imports)
    titles = {FLOOR: "floor: read, write, fsync"} | {
        each.key: f"{each.title} {found[each.key][each.packages[0]]}" for each in candidates
    }
    print(f"{stand.input_bytes / 1e9:.2f} GB of input, {about['page_cache']} page cache, {options.threads} threads, "
          f"pinned to {processors or 'nothing'}, best of {options.rounds}; {about['processor']}")  # fmt: skip
    print(f"\n{markdown(table, titles)}")
    for sentence in missing:
        print(f"\n{sentence}")
    if options.json:
        document = {
            "machine": about,
            "source": {"folder": str(stand.source), "bytes": stand.input_bytes, "tensors": len(stand.tensors)},
            "versions": found,
            "missing": missing,
            "imports": imports,
            "runs": [asdict(each) for each in runs],
            "rows": [asdict(each) for each in table],
            "leads": [asdict(each) for each in leads(table)],
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 1 if missing or any(row.failure for row in table) else 0


if __name__ == "__main__":
    sys.exit(main())
