"""What rounding costs on text that nobody has seen, by method and tool, at what size and for how many CPU seconds.

    bash benchmarks/peers/setup.sh llm-compressor auto-round torchao bitsandbytes gptqmodel
    python benchmarks/bench_quality.py WORK [--only gptq,auto-round] [--schemes int4-g128] [--json FILE] [--plot FILE]

The demo checkpoint's routed experts are rounded by qconvert's methods and by peers, in environments of their own, each
calibrated on the same token windows; then all outputs are run, in float32 by the reference model, on the held-out texts
that neither training nor calibration has seen. What a candidate takes is that of its whole processes, imports and
reading included; qconvert's imatrix includes `qconvert calibrate`.

WORK keeps every output, what it took and its scores: the same command goes on after the last candidate that was
finished, and further ones are added. The table has all that WORK holds. What a peer cannot do is told with its reason.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from comparison.candidates import versions
from comparison.experts import experts_found, sizes, stored_in
from comparison.methods import BASELINE, MEASURE, PEERS_ALONE, SCHEMES, WIDER, Method, Text, our_methods, peer_methods
from comparison.process import failure, run

HERE = Path(__file__).parent
DEMO = HERE.parent / "reference_model" / "demo"
ALL_SCHEMES = (*SCHEMES, *PEERS_ALONE, "nf4", *WIDER)
LOGITS = "logits"
"""The one tensor of ``logits.safetensors``, where a peer leaves it beside its checkpoint."""

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One candidate in one scheme.

    Attributes:
        ours: whether it is qconvert.
        versions: of its packages.
        wall, cpu: seconds of all its processes.
        peak_rss: bytes of the largest of them.
        bytes: of all tensors of the output.
        text_bytes: of those without MTP head and vision tower, which some peers drop.
        expert_bits: a weight of a routed expert of the decoder, scales and all.
        experts: how the routed experts are stored, in words.
        changed: other tensors of the decoder whose values are not the original's.
        failure: why there is no output or no score; the numbers mean nothing then.
    """

    key: str
    scheme: str
    title: str
    ours: bool
    versions: Mapping[str, str]
    wall: float = 0.0
    cpu: float = 0.0
    peak_rss: int = 0
    bytes: int = 0
    text_bytes: int = 0
    expert_bits: float = 0.0
    experts: str = ""
    changed: int = 0
    failure: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stand:
    """What stays the same through a whole run.

    Attributes:
        source: the checkpoint.
        held_out: tokens that are scored.
    """

    source: Path
    work: Path
    held_out: int
    env: dict[str, str]
    timeout: float

    def file(self, one: Method, scheme: str, ending: str) -> Path:
        """What belongs to a candidate in a scheme."""
        return self.work / f"{one.key}.{scheme}{ending}"


def say(text: str) -> None:
    """Progress goes to the error stream; results alone go to the output."""
    print(text, file=sys.stderr, flush=True)


def measure(stand: Stand, method: Method, scheme: str) -> Measured:
    """Round, look at the output's headers, and score it."""
    found = Measured(key=method.key, scheme=scheme, title=method.title, ours=method.ours, versions={})
    try:
        found = replace(found, versions=versions(method, stand.env))
    except ValueError as error:
        return replace(found, failure=str(error))
    package = method.packages[0]
    found = replace(found, title=f"{method.title} {found.versions[package]}" if not method.ours else method.title)
    out = stand.file(method, scheme, "")
    for path in stand.work.glob(f"{out.name}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for command in method.commands(stand.source, out, scheme):
        log = stand.file(method, scheme, ".log")
        taken = run(command, env=stand.env, log=log, timeout=stand.timeout, folder=stand.work)  # one leaves logs there
        found = replace(
            found,
            wall=found.wall + taken.wall,
            cpu=found.cpu + taken.cpu,
            peak_rss=max(found.peak_rss, taken.peak_rss),
            failure=failure(taken),
        )
        if found.failure is not None:
            return found
    try:
        source, output = stored_in(stand.source), [one for one in stored_in(out) if one.name != LOGITS]
        found = replace(found, **asdict(sizes(source, output)), experts=str(experts_found(source, output)))
    except ValueError as error:
        return replace(found, failure=f"no checkpoint came out: {error}")
    return score(stand, method, scheme, found)


def score(stand: Stand, method: Method, scheme: str, found: Measured) -> Measured:
    """Run the output on the held-out text, in a process of its own: this one stays small."""
    out = stand.file(method, scheme, "")
    command = [sys.executable, str(HERE / "quality" / "score.py"), str(stand.source), str(out)]
    command += [str(stand.file(method, scheme, ".scores")), "--tokens", str(stand.held_out)]
    command += ["--original-logits", str(stand.work / "original.safetensors")]
    if method.logits:
        command += ["--logits", str(out / "logits.safetensors")]
    taken = run(command, env=stand.env, log=stand.file(method, scheme, ".scoring.log"), timeout=stand.timeout)
    reason = failure(taken)
    if reason is not None:
        return replace(found, failure=f"its output cannot be scored: {reason}")
    said = json.loads(taken.last_words.splitlines()[-1])
    return replace(found, changed=len(said["changed"]))


def windows(work: Path, tokens: int, held_out: int) -> None:
    """Write the token windows that peers take, and those that they are asked about; refuse those of another run.

    Raises:
        SystemExit: WORK holds results on other tokens.
    """
    said = json.dumps({"calibration_tokens": tokens, "held_out": held_out})
    note = work / "settings.json"
    if note.exists() and note.read_text() != said:
        raise SystemExit(f"{work} holds results on other tokens, {note.read_text()}: give another folder")
    note.write_text(said)
    command = [sys.executable, str(HERE / "quality" / "windows.py"), str(DEMO), str(work)]
    done = run([*command, str(tokens), str(held_out)], env=dict(os.environ), log=work / "windows.log", timeout=600)
    if reason := failure(done):
        raise SystemExit(f"no token windows: {reason}")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for outputs and scores, about a gigabyte")
    parser.add_argument("--only", help="candidates, with commas between them; 'none' prints what WORK holds")
    parser.add_argument("--schemes", default=",".join(ALL_SCHEMES), help="default: %(default)s")
    parser.add_argument("--calibration-tokens", type=int, default=65_536, help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=40_960, help="held-out tokens at most; default: all of 35,410")
    parser.add_argument("--peer-folder", type=Path, default=HERE / ".peers", help="where peers/setup.sh put them")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=7200, help="seconds that one candidate may take")
    parser.add_argument("--fresh", action="store_true", help="measure again what WORK holds")
    parser.add_argument("--json", type=Path, help="write every row to this file")
    parser.add_argument("--plot", type=Path, help="draw the frontier to this SVG file (needs matplotlib)")
    return parser.parse_args()


def main() -> int:
    """Measure what is missing, print all."""
    asked = arguments()
    work = asked.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    windows(work, asked.calibration_tokens, asked.tokens)
    text = Text(ids=work / "calibration.npy", options=("--tokens", str(asked.calibration_tokens)))
    methods = [
        *our_methods(asked.threads, text),
        *peer_methods(asked.peer_folder.absolute(), text, work / "held-out.npz"),
    ]
    wanted = [one.key for one in methods] if asked.only is None else asked.only.split(",")
    if not {*wanted} <= {"none", *(one.key for one in methods)}:
        raise SystemExit(f"--only {asked.only}: expected names out of {', '.join(one.key for one in methods)}")
    env = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(asked.threads)), "HF_HUB_OFFLINE": "1"}
    stand = Stand(source=DEMO, work=work, held_out=asked.tokens, env=env, timeout=asked.timeout)
    measured = []
    for scheme in asked.schemes.split(","):
        for method in methods:
            note = stand.file(method, scheme, ".json")
            if scheme in method.schemes and method.key in wanted and (asked.fresh or not note.exists()):
                say(f"{scheme}: {method.title}")
                found = measure(stand, method, scheme)
                note.write_text(json.dumps(asdict(found)) + "\n")
                say(f"  {found.failure}" if found.failure else f"  {found.cpu:.0f} CPU s, {found.experts}")
            if note.exists():
                measured.append(json.loads(note.read_text()))
    return report(asked, work, measured)


def report(asked: argparse.Namespace, work: Path, measured: Sequence[Mapping[str, Any]]) -> int:
    """Print the tables; 1 if a method of qconvert failed or a peer is better at equal bytes."""
    from quality.picture import draw  # torch comes with it: nothing that is measured is started from so large a process
    from quality.table import markdown, rows
    from safetensors.numpy import load_file

    scores = {}
    for one in measured:
        path = work / f"{one['key']}.{one['scheme']}.scores"
        if one["failure"] is None:
            scores[one["key"], one["scheme"]] = load_file(path)
    table = rows(measured, scores, BASELINE, MEASURE)
    positions = len(next(iter(scores.values()))["kl"]) if scores else 0
    print(f"{positions:,} held-out positions, {asked.calibration_tokens:,} tokens of calibration\n\n{markdown(table)}")
    if asked.plot is not None:
        # folds one by one would hide the others, and in wider schemes there are no peers
        drawn = (one for one in table if one.measured["scheme"] not in WIDER)
        draw([one for one in drawn if not one.measured["key"].startswith("awq-")], asked.plot)
    if asked.json is not None:
        asked.json.write_text(json.dumps([asdict(row) for row in table], indent=1) + "\n", encoding="utf-8")
    beaten = [row.measured["title"] for row in table if row.lower_than_ours]
    if beaten:
        print(f"\nLower than qconvert gptq at no more bytes, beyond the interval: {', '.join(beaten)}.")
    return 1 if beaten or any(one["ours"] and one["failure"] for one in measured) else 0


if __name__ == "__main__":
    sys.exit(main())
