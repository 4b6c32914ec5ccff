"""Whether the routed experts of an output are in fewer bits, from its safetensors headers alone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

WIDE = frozenset({"BF16", "F16", "F32", "F64"})
_BESIDE_WEIGHTS = ("scale", "zero", "shape", "g_idx")
NO_EXPERTS = "the source has no routed experts (tensors named *.mlp.experts.*)"
_WEIGHTS_A_BYTE = 4
"""No scheme here has fewer than two bits a weight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One tensor as a header names it."""

    name: str
    dtype: str
    numel: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsFound:
    """How the routed experts are stored.

    Attributes:
        share: of the source's expert weights, the part that the output holds in packed or 8-bit numbers.
        dtypes: of the tensors that hold the weights.
    """

    share: float
    dtypes: tuple[str, ...]

    @property
    def quantized(self) -> bool:
        """All of them, up to rounding of the count."""
        return self.share > 0.99

    def __str__(self) -> str:
        said = "yes" if self.quantized else "no" if self.share < 0.01 else f"{self.share:.0%}"
        return f"{said} ({', '.join(self.dtypes) or 'none stored'})"


def stored_in(folder: Path) -> list[Stored]:
    """Every tensor of the safetensors files in ``folder``.

    Raises:
        ValueError: there are none, or one has no header that can be read.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no safetensors files")
    tensors = []
    for path in files:
        with path.open("rb") as file:
            try:
                length = int.from_bytes(file.read(8), "little")
                if not 0 < length < path.stat().st_size:
                    raise ValueError(f"a header of {length} bytes")
                entries = json.loads(file.read(length))
                tensors += [
                    Stored(
                        name=name,
                        dtype=entry["dtype"],
                        numel=math.prod(entry["shape"]),
                        nbytes=entry["data_offsets"][1] - entry["data_offsets"][0],
                    )
                    for name, entry in entries.items()
                    if name != "__metadata__"
                ]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path} has no readable safetensors header: {error}") from error
    return tensors


def routed_expert_weights(tensors: Iterable[Stored]) -> list[Stored]:
    """Those that hold weights of routed experts, stacked or one by one; scales and MTP left out."""
    return [
        each
        for each in tensors
        if ".mlp.experts." in each.name
        and not each.name.startswith("mtp.")
        and not any(word in each.name.rpartition(".")[2] for word in _BESIDE_WEIGHTS)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How large an output is.

    Attributes:
        bytes: of all tensors.
        text_bytes: of those without MTP head and vision tower, which some tools drop.
        expert_bits: a weight of a routed expert of the decoder, scales and all.
    """

    bytes: int
    text_bytes: int
    expert_bits: float


def sizes(source: Iterable[Stored], output: Sequence[Stored]) -> Sizes:
    """Compare what the source has with what the output has.

    Raises:
        ValueError: the source has no routed experts.
    """
    weights = sum(each.numel for each in routed_expert_weights(source))
    if not weights:
        raise ValueError(NO_EXPERTS)
    text = [each for each in output if not each.name.startswith("mtp.") and "visual." not in each.name]
    experts = sum(each.nbytes for each in text if ".mlp.experts." in each.name)
    return Sizes(
        bytes=sum(each.nbytes for each in output),
        text_bytes=sum(each.nbytes for each in text),
        expert_bits=8 * experts / weights,
    )


def experts_found(source: Iterable[Stored], output: Iterable[Stored]) -> ExpertsFound:
    """Compare what the source has with what the output has.

    Raises:
        ValueError: the source has no routed experts.
    """
    total = sum(each.numel for each in routed_expert_weights(source))
    if not total:
        raise ValueError(NO_EXPERTS)
    held = routed_expert_weights(output)
    wide = sum(each.numel for each in held if each.dtype in WIDE)
    narrow = sum(each.nbytes for each in held if each.dtype not in WIDE)
    # what is left out altogether is not quantized either
    share = max(0, min(total - wide, narrow * _WEIGHTS_A_BYTE)) / total
    return ExpertsFound(share=share, dtypes=tuple(sorted({each.dtype for each in held})))
