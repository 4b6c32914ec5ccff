"""Who is compared: how each is called, in which environment, and what its output needs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .results import OURS, UNREAD

SCHEMES = ("int4-g128", "int8", "fp8", "fp8-block")
_PEERS = Path(__file__).parents[1] / "peers"
_OUR_SCHEMES = {
    "int4-g128": ("--scheme", "int4", "--group", "128"),
    "int8": ("--scheme", "int8"),
    "fp8": ("--scheme", "fp8"),
    "fp8-block": ("--scheme", "fp8-block"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """Something that quantizes a checkpoint, called as a whole process.

    Attributes:
        key: what the command line calls it.
        title: what tables call it, without its version.
        schemes: those that it has a counterpart of.
        python: the interpreter of its environment.
        command: from source, output and scheme to what is run.
        imports: the statement whose time is printed apart.
        packages: those whose versions are printed, the first being its own.
        fsyncs: whether it makes its output last itself; where not, the harness does and counts the time.
    """

    key: str
    title: str
    schemes: tuple[str, ...]
    python: Path
    command: Callable[[Path, Path, str], list[str]]
    imports: str
    packages: tuple[str, ...]
    fsyncs: bool = False


def ours(threads: int, *, read_back: bool = True) -> Candidate:
    """The qconvert of this process's environment, which reads back what it writes or trusts the disk."""
    program = Path(sys.executable).with_name("qconvert")
    beside = () if read_back else ("--no-read-back",)

    def command(source: Path, out: Path, scheme: str) -> list[str]:
        options = [*_OUR_SCHEMES[scheme], "--jobs", str(threads), "--json", *beside]
        return [str(program), "quantize", str(source), str(out), *options]

    return Candidate(
        key=OURS if read_back else UNREAD,
        title="qconvert" if read_back else "qconvert --no-read-back",
        schemes=SCHEMES,
        python=Path(sys.executable),
        command=command,
        imports="import qconvert.cli.quantize",
        packages=("qconvert", "torch", "numba"),
        fsyncs=True,
    )


def peers(folder: Path) -> tuple[Candidate, ...]:
    """The peers, in the environments that ``peers/setup.sh`` makes in ``folder``."""

    def peer(
        key: str, title: str, script: str, schemes: tuple[str, ...], imports: str, packages: tuple[str, ...]
    ) -> Candidate:
        python = folder / key / "bin" / "python"
        return Candidate(
            key=key,
            title=title,
            schemes=schemes,
            python=python,
            command=lambda source, out, scheme: [str(python), str(_PEERS / script), str(source), str(out), scheme],
            imports=imports,
            packages=packages,
        )

    return (
        peer(
            "llm-compressor",
            "llm-compressor model_free_ptq",
            "model_free_ptq.py",
            SCHEMES,
            "from llmcompressor import model_free_ptq",
            ("llmcompressor", "compressed-tensors", "transformers", "torch"),
        ),
        peer(
            "auto-round",
            "AutoRound model-free",
            "auto_round_model_free.py",
            ("int4-g128",),
            "from auto_round import AutoRound",
            ("auto-round", "transformers", "torch"),
        ),
        peer(
            "torchao",
            "torchao by name",
            "torchao_by_name.py",
            ("fp8",),
            "import torchao.quantization; from transformers import AutoModelForCausalLM, TorchAoConfig",
            ("torchao", "transformers", "torch"),
        ),
    )


PEER_KEYS = tuple(each.key for each in peers(Path()))


def versions(candidate: Candidate, env: Mapping[str, str]) -> dict[str, str]:
    """The versions of ``candidate.packages`` in its environment.

    Raises:
        ValueError: the environment is not there, or a package is missing in it.
    """
    if not candidate.python.exists():
        raise ValueError(f"no environment at {candidate.python.parents[1]}; run benchmarks/peers/setup.sh")
    asked = (
        f"import json, importlib.metadata as m; print(json.dumps({{n: m.version(n) for n in {candidate.packages}}}))"
    )
    done = subprocess.run([candidate.python, "-c", asked], env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"{candidate.python.parents[1]} is not as setup.sh leaves it: {last}")
    found: dict[str, str] = json.loads(done.stdout)
    return found
