"""Who rounds the routed experts by which method: qconvert's own and those of peers, all on the same text."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .candidates import Candidate

SCHEMES = ("int4-g128", "int4-g32", "int8")
PEERS_ALONE = ("int8-g128",)
"""Experts in int8 in groups of 128, as peers have it by default; qconvert writes int8 with a scale a row."""
WIDER = ("mixed", "int4-all")
"""Experts in int4 in groups of 128, and what is always active in int8, or in int4 in groups of 64: ours alone."""
BASELINE, MEASURE = "rtn", "gptq"
"""What gains are told on, and what peers are held against."""
_PEERS = Path(__file__).parents[1] / "peers"
_OF_QUANTIZE = {
    "--text": "--calibration-data", "--tokens": "--calibration-tokens", "--window": "--calibration-window",
}  # fmt: skip
"""What `qconvert calibrate` calls otherwise."""

_OUR_SCHEMES = {
    "int4-g128": ("--scheme", "int4", "--group", "128"),
    "int4-g32": ("--scheme", "int4", "--group", "32"),
    "int8": ("--scheme", "int8"),
    "mixed": ("--scheme", "int4", "--preset", "mixed"),
    "int4-all": ("--scheme", "int4", "--policy", str(Path(__file__).with_name("always-active-int4.toml"))),
}
_FOLDS = {
    "none": (*SCHEMES, *WIDER),
    "up-down,post-attention": (*SCHEMES, *WIDER),
    "up-down,input": WIDER,
    "up-down,value": WIDER,
    "up-down,linear-norm": WIDER,
    "up-down,input,value,linear-norm": WIDER,
    "up-down,post-attention,input,value,linear-norm": WIDER,
}
"""What `--awq-folds` is asked for beside the usual, and where it has something to fold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """What calibrated methods look at.

    Attributes:
        ids: int64 [W, T] in .npy, the windows for peers.
        options: from which qconvert cuts the same windows, in the words of ``qconvert calibrate``.
    """

    ids: Path
    options: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Method(Candidate):
    """A candidate in one of its ways.

    Attributes:
        before: from source, output and scheme to what is run first and counts as well, or nothing.
        logits: whether its output holds ``logits.safetensors`` of the held-out windows, for formats that qconvert
            does not read.
        ours: whether it is qconvert.
    """

    before: Callable[[Path, Path, str], list[str]] | None = None
    logits: bool = False
    ours: bool = False

    def commands(self, source: Path, out: Path, scheme: str) -> list[list[str]]:
        """All that is run, one after another."""
        first = [] if self.before is None else [self.before(source, out, scheme)]
        return [*first, self.command(source, out, scheme)]


def our_methods(threads: int, text: Text) -> tuple[Method, ...]:
    """The methods of the qconvert in this process's environment."""
    program = str(Path(sys.executable).with_name("qconvert"))
    jobs = ["--jobs", str(threads), "--json"]
    read = [_OF_QUANTIZE.get(option, option) for option in text.options]

    def stats(out: Path) -> str:
        return str(out.with_name(f"{out.name}-stats"))

    def calibrate(source: Path, out: Path, _: str) -> list[str]:
        return [program, "calibrate", str(source), "-o", stats(out), *text.options, *jobs]

    def method(
        name: str, title: str, options: Callable[[Path], Sequence[str]], before: Callable[..., list[str]] | None = None,
        schemes: tuple[str, ...] = (*SCHEMES, *WIDER),
    ) -> Method:  # fmt: skip
        def command(source: Path, out: Path, scheme: str) -> list[str]:
            return [program, "quantize", str(source), str(out), *_OUR_SCHEMES[scheme], *options(out), *jobs]

        return Method(
            key=name,
            title=f"qconvert {title}",
            schemes=schemes,
            python=Path(sys.executable),
            command=command,
            before=before,
            imports="import qconvert.cli.quantize",
            packages=("qconvert", "torch", "numba"),
            ours=True,
        )

    def key(folds: str) -> str:
        return f"awq-{folds.removeprefix('up-down,').replace(',', '-')}"

    def by(folds: str) -> Callable[[Path], Sequence[str]]:
        return lambda _: ("--method", "awq", "--awq-folds", folds, *read)

    return (
        method(BASELINE, "rtn --search", lambda _: ("--search",)),
        method("imatrix", "imatrix", lambda out: ("--method", "imatrix", "--stats", stats(out)), calibrate),
        method("awq", "awq", lambda _: ("--method", "awq", *read)),
        *(method(key(folds), f"awq, folds {folds}", by(folds), schemes=schemes) for folds, schemes in _FOLDS.items()),
        method("gptq", "gptq", lambda _: ("--method", "gptq", *read)),
    )  # fmt: skip


def peer_methods(folder: Path, text: Text, held_out: Path) -> tuple[Method, ...]:
    """The peers, in the environments that ``peers/setup.sh`` makes in ``folder``."""

    def peer(
        key: str, environment: str, title: str, script: str, schemes: tuple[str, ...], packages: tuple[str, ...],
        *, logits: bool = False, variant: str = "",
    ) -> Method:  # fmt: skip
        python = folder / environment / "bin" / "python"
        given = held_out if logits else text.ids

        def command(source: Path, out: Path, scheme: str) -> list[str]:
            return [str(python), str(_PEERS / script), str(source), str(out), scheme + variant, str(given)]

        return Method(
            key=key,
            title=title,
            schemes=schemes,
            python=python,
            command=command,
            imports="import torch",
            packages=(*packages, "transformers", "torch"),
            logits=logits,
        )

    return (
        peer("llm-compressor", "llm-compressor", "llm-compressor GPTQ", "llm_compressor_gptq.py",
             (*SCHEMES, *PEERS_ALONE), ("llmcompressor", "compressed-tensors")),
        peer("llm-compressor-mse", "llm-compressor", "llm-compressor GPTQ, searched scales", "llm_compressor_gptq.py",
             ("int4-g128", "int4-g32"), ("llmcompressor", "compressed-tensors"), variant="-mse"),
        peer("gptqmodel", "gptqmodel", "GPTQModel GPTQ", "gptqmodel_gptq.py", (*SCHEMES, *PEERS_ALONE),
             ("gptqmodel",)),
        peer("auto-round", "auto-round", "AutoRound", "auto_round_tuned.py", (*SCHEMES, *PEERS_ALONE),
             ("auto-round",)),
        peer("bitsandbytes", "bitsandbytes", "bitsandbytes", "bitsandbytes_nf4.py", ("nf4",), ("bitsandbytes",)),
        peer("torchao", "torchao", "torchao", "torchao_weight_only.py", ("int4-g128", "int8"), ("torchao",),
             logits=True),
    )  # fmt: skip
