"""What decides a calibrated conversion beside its policy."""

from __future__ import annotations

import json
import platform
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
import xxhash
from torch import Tensor

from qconvert.core.awq_fold import DEFAULT_FOLDS, AwqFold, folds_said
from qconvert.core.errors import UsageError
from qconvert.numerics.hessian import DAMPING

Method = Literal["gptq", "awq"]
"""``gptq``: error feedback; ``awq``: what a matrix reads is scaled by ``AwqFold``s, then it is rounded to nearest."""

FOLDS = "folds"
"""What manifests call those of a conversion."""

MOST_FLIPS = 0.01
"""Share of the router's choices that may be others because a fold rounds the router again; beyond, it is given up.

Ten times what is seen on trained routers: 0.07% on the demo checkpoint. A token that goes elsewhere costs more than
rounding one expert more finely gives.
"""

METHODS: tuple[Method, ...] = get_args(Method)


def method_named(name: str) -> Method:
    """The method that a user asks for.

    Raises:
        UsageError: there is none of that name.
    """
    for method in METHODS:
        if method == name:
            return method
    raise UsageError(f"method {name!r} is unknown; expected one of {', '.join(METHODS)}")


def tried_at_once(folds: Collection[AwqFold], jobs: int) -> int:
    """How many factors of a layer's input ``jobs`` threads try at once under these folds."""
    return jobs if AwqFold.INPUT in folds else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Text, and what is made of it.

    Attributes:
        method: how matrices are rounded.
        batches: token windows int64 [B, T] each, in the order in which they are run.
        record: where they come from, as plain JSON.
        damping: share of the mean of a Hessian's diagonal that is added to it.
        propagate: whether a layer is fed what the rounded layers before it give, or what the original's do.
        folds: of ``awq``, where inputs are scaled; other methods have none.
    """

    method: Method
    batches: tuple[Tensor, ...]
    record: Mapping[str, Any] = field(default_factory=dict)
    damping: float = DAMPING
    propagate: bool = True
    folds: tuple[AwqFold, ...] = DEFAULT_FOLDS

    def __post_init__(self) -> None:
        method_named(self.method)
        if not 0.0 < self.damping <= 1.0:
            raise UsageError(f"a damping of {self.damping}: expected a share above 0 and up to 1")
        if not self.batches or any(ids.ndim != 2 or ids.shape[1] < 2 for ids in self.batches):
            raise UsageError("calibration needs token windows of at least two tokens")

    def folds_by(self, fold: AwqFold) -> bool:
        """Whether matrices are scaled so."""
        return self.method == "awq" and fold in self.folds

    def tried(self, jobs: int) -> int:
        """How many factors of a layer's input are tried at once by so many threads."""
        return tried_at_once(self.folds, jobs) if self.method == "awq" else 0

    @property
    def tokens(self) -> int:
        """Tokens in all windows."""
        return sum(ids.numel() for ids in self.batches)

    @property
    def entry(self) -> dict[str, Any]:
        """What manifests say of it."""
        return {
            "method": self.method,
            "damping": self.damping,
            "propagate": self.propagate,
            "tokens": self.tokens,
            **({FOLDS: folds_said(self.folds)} if self.method == "awq" else {}),
            "data": dict(self.record),
        }

    @property
    def hash(self) -> str:
        """xxh3-128 of all that the bytes depend on: options, tokens, and who multiplies matrices."""
        machine = [platform.machine(), torch.backends.cpu.get_cpu_capability()]
        said = {**self.entry, "torch": torch.__version__, "machine": machine}
        digest = xxhash.xxh3_128(json.dumps(said, sort_keys=True).encode())
        for ids in self.batches:
            digest.update(f"{tuple(ids.shape)}".encode())
            digest.update(ids.to(torch.int64).contiguous().numpy().tobytes())
        return digest.hexdigest()
