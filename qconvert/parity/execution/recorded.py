"""What an engine made of some tokens, layer by layer, to be compared block by block with the reference.

A file of states is safetensors, for any engine to write. It holds one run or several; of several, each name begins with
the run's name and a slash. Of a run with B rows of T tokens, D hidden, E experts, V vocabulary:

- ``tokens`` integers [B, T]; ``mask`` integers [B, T], zero at padding, left out where there is none; ``calls``
  integers [P]: so many tokens were given at once, all rows together; left out where all were;
- ``layers.N.hidden`` [B, T, D]: hidden states after layer N, of every layer, before the final norm;
- ``layers.N.mixer`` and ``layers.N.moe`` [B, T, D]: what attention or linear attention, and the experts, add to them;
  ``layers.N.router`` [B, T, E]: the router's logits. Each of the three for all layers, or left out: where both
  ``mixer`` and ``moe`` are, an unknown fault is localised to its layer and not to its block;
- ``embeddings`` [B, T, D], what enters the first layer, and ``logits`` [B, T, V]; both may be left out.

Floats are of 16 or 32 bits. Metadata: ``format`` (``FORMAT``), and ``engine``, any text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qconvert.core.errors import OutputError, SourceError
from reference_model.config import TextConfig

FORMAT = "qconvert-states/1"

MIXER, MOE, ROUTER, HIDDEN = "mixer", "moe", "router", "hidden"

_INTEGERS = (torch.int32, torch.int64, torch.uint8, torch.int8)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """One run of an engine over rows [B, T] that do not see each other.

    Attributes:
        name: in a report, for example ``in pieces``.
        ids: int64 [B, T].
        real: which tokens are no padding, bool [B, T].
        calls: how many tokens each call had.
        take: gives one of the four of a layer, or ``None`` where the engine did not tell.
        embeddings: what enters the first layer [B, T, D].
        logits: [B, T, V].
        last: those of the last real token of each row [B, V].
    """

    name: str
    ids: Tensor
    real: Tensor
    calls: tuple[int, ...]
    take: Callable[[int, str], Tensor | None]
    embeddings: Tensor | None = None
    logits: Tensor | None = None
    last: Tensor | None = None

    @property
    def padded(self) -> bool:
        """Whether any token is padding."""
        return not bool(self.real.all())


def holds_states(path: Path) -> bool:
    """Whether ``path`` is a file of states, whatever is in it."""
    try:
        with safe_open(path, framework="pt") as file:
            return bool((file.metadata() or {}).get("format") == FORMAT)
    except (OSError, SafetensorError):
        return False


def save_states(path: Path, runs: Mapping[str, Mapping[str, Tensor]], engine: str) -> None:
    """Write the tensors of each run, by its name, in the format above.

    Raises:
        OutputError: the file cannot be written.
    """
    tensors = {
        (f"{name}/{key}" if name else key): tensor.clone(memory_format=torch.contiguous_format)  # runs may share some
        for name, run in runs.items()
        for key, tensor in run.items()
    }
    try:
        save_file(tensors, path, {"format": FORMAT, "engine": engine})
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot write {path}: {error}") from error


def read_states(path: Path, config: TextConfig) -> Iterator[Recorded]:
    """All runs of a file of states of a model of these sizes; of large tensors one at a time is read.

    Raises:
        SourceError: the file cannot be read, lacks something, or is of a model of other sizes.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
    except (OSError, SafetensorError) as error:
        raise SourceError(f"cannot read {path}: {error}") from error
    runs = sorted(name.removesuffix("tokens") for name in names if name == "tokens" or name.endswith("/tokens"))
    if not runs:
        raise SourceError(f"{path} holds no 'tokens': nothing says what the states are of")
    known = {name for prefix in runs for name in names if name.startswith(prefix)}
    if stray := sorted(names - known):
        raise SourceError(f"{path}: {stray[0]!r} belongs to no run: there are {', '.join(map(repr, runs))}")
    for prefix in runs:
        yield _run(_File(path, prefix, {name for name in names if name.startswith(prefix)}), config)


class _File:
    """The tensors of one run, read when they are asked for and checked against the shape that they must have."""

    def __init__(self, path: Path, prefix: str, names: set[str]) -> None:
        self.path, self.prefix, self.names = path, prefix, names

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.names

    def get(self, name: str, kinds: tuple[torch.dtype, ...], shape: tuple[int | None, ...]) -> Tensor:
        whole = self.prefix + name
        if whole not in self.names:
            raise SourceError(f"{self.path}: {whole!r} is missing")
        try:
            with safe_open(self.path, framework="pt") as file:
                found: Tensor = file.get_tensor(whole)
        except (OSError, SafetensorError) as error:
            raise SourceError(f"cannot read {whole!r} of {self.path}: {error}") from error
        fits = len(found.shape) == len(shape) and all(b in (None, a) for a, b in zip(found.shape, shape, strict=True))
        if found.dtype not in kinds or not fits or not found.numel():
            expected = [n if n is not None else "any" for n in shape]
            kind = "integers" if kinds is _INTEGERS else "floats of 16 or 32 bits"
            raise SourceError(
                f"{self.path}: {whole!r} is {found.dtype} {list(found.shape)}, expected {kind} {expected}: the sizes "
                "of the checkpoint that it is compared with"
            )
        return found


def _run(file: _File, config: TextConfig) -> Recorded:
    ids = file.get("tokens", _INTEGERS, (None, None)).to(torch.int64)
    rows, tokens = ids.shape
    if int(ids.min()) < 0 or int(ids.max()) >= config.vocab_size:
        raise SourceError(f"{file.path}: '{file.prefix}tokens' has ids beyond the vocabulary of {config.vocab_size}")
    mask = file.get("mask", _INTEGERS, (rows, tokens)) if "mask" in file else torch.ones(rows, tokens)
    calls = file.get("calls", _INTEGERS, (None,)).tolist() if "calls" in file else [tokens]
    if sum(calls) != tokens or min(calls) < 1:
        raise SourceError(f"{file.path}: '{file.prefix}calls' is {calls}, which does not add up to {tokens} tokens")
    hidden, layers = config.hidden_size, range(config.num_hidden_layers)
    widths = {HIDDEN: hidden, MIXER: hidden, MOE: hidden, ROUTER: config.num_experts}
    told = [name for name in widths if name == HIDDEN or any(f"layers.{n}.{name}" in file for n in layers)]
    allowed = {f"{file.prefix}layers.{n}.{name}" for n in layers for name in told}
    of_run = {file.prefix + name for name in ("tokens", "mask", "calls", "embeddings", "logits")}
    if stray := sorted(file.names - allowed - of_run):
        raise SourceError(f"{file.path}: {stray[0]!r} is none of a model of {len(layers)} layers")
    if missing := sorted(allowed - file.names):
        raise SourceError(f"{file.path}: {missing[0]!r} is missing")

    def take(layer: int, name: str) -> Tensor | None:
        if name not in told:
            return None
        return file.get(f"layers.{layer}.{name}", _FLOATS, (rows, tokens, widths[name]))

    shapes = {"embeddings": hidden, "logits": config.vocab_size}
    beside = {
        name: file.get(name, _FLOATS, (rows, tokens, width)) if name in file else None for name, width in shapes.items()
    }
    return Recorded(
        name=file.prefix.rstrip("/") or "the run",
        ids=ids,
        real=mask != 0,
        calls=tuple(calls),
        take=take,
        embeddings=beside["embeddings"],
        logits=beside["logits"],
    )
