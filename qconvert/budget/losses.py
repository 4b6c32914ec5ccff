"""What was measured, as a file: the loss of each part in each scheme, on which text of which checkpoint.

Parts together cost less than the sum of what each costs alone: where a token's experts change, they change once,
whichever part is to blame. The finer the scheme, the more of its loss is of this kind. So all parts in one scheme are
measured too, and what a part costs alone is taken for its share of that: what is predicted of a model in one scheme is
then what was measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qconvert import __version__
from qconvert.budget.parts import Part
from qconvert.core.errors import SourceError, UsageError
from qconvert.io.disk import disk_errors, sync_file
from qconvert.io.strict_json import parse_object
from qconvert.parity.outputs.folder import replace_text

VERSION = 2
_KEY = "qconvert_sensitivities"


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """Mean KL(original || original with one part rounded), nats; ``low`` to ``high`` is its 95% interval."""

    kl: float
    low: float
    high: float


Key = tuple[str, int, str]
"""Group, layer and name of the scheme."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Together:
    """What several parts cost in one scheme, and the sum of what each costs ``alone``."""

    loss: Loss
    alone: float

    @property
    def share(self) -> float:
        """What remains of a loss alone when the others are there too."""
        return max(self.loss.kl, 0.0) / self.alone if self.alone > 0 else 1.0


@dataclass(slots=True, kw_only=True)
class Losses:
    """The measurements of one checkpoint on one text.

    Attributes:
        path: where they are kept.
        fingerprint: of the checkpoint, see ``io/fingerprint.py``.
        text: where the tokens come from, see ``CalibrationWindows``.
        search: whether scales were searched.
        found: what is known so far of parts alone.
        together: by scheme, of all parts that there were to decide when it was measured first.
    """

    path: Path
    fingerprint: str
    text: Mapping[str, Any]
    search: bool
    found: dict[Key, Loss] = field(default_factory=dict)
    together: dict[str, Together] = field(default_factory=dict)

    def missing(self, parts: Iterable[Part]) -> list[tuple[Part, str]]:
        """Parts and names of schemes that are not measured."""
        return [(part, name) for part in parts for name in part.schemes if key(part, name) not in self.found]

    def missing_together(self, parts: Sequence[Part]) -> list[tuple[tuple[Part, ...], str]]:
        """The parts that a scheme fits, and its name, where none are measured together."""
        schemes = dict.fromkeys(name for part in parts for name in part.schemes)
        return [
            (tuple(part for part in parts if name in part.schemes), name)
            for name in schemes
            if name not in self.together
        ]

    def complete(self, parts: Sequence[Part]) -> bool:
        """Whether all is measured."""
        return not self.missing(parts) and not self.missing_together(parts)

    def alone(self, part: Part, scheme: str) -> float:
        """What a part costs if all others stay as they are.

        Raises:
            KeyError: it is not measured.
        """
        return self.found[key(part, scheme)].kl

    def among_others(self, part: Part, scheme: str) -> float:
        """What a part costs in a model whose other parts are rounded too.

        Raises:
            KeyError: it is not measured, or the scheme not together.
        """
        return self.together[scheme].share * self.alone(part, scheme)

    def save(self) -> None:
        """Write the file, whole or not at all.

        Raises:
            OutputError: it cannot be written.
        """
        document = {
            _KEY: VERSION,
            "qconvert": __version__,
            "checkpoint": self.fingerprint,
            "search": self.search,
            "text": dict(self.text),
            "measured": [
                {"group": group, "layer": layer, "scheme": scheme, "kl": loss.kl, "low": loss.low, "high": loss.high}
                for (group, layer, scheme), loss in sorted(self.found.items())
            ],
            "together": [
                {"scheme": name, "kl": one.loss.kl, "low": one.loss.low, "high": one.loss.high, "alone": one.alone}
                for name, one in sorted(self.together.items())
            ],
        }
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            sync_file(replace_text(self.path, json.dumps(document, indent=1, allow_nan=False) + "\n"))


def key(part: Part, scheme: str) -> Key:
    """What measurements are found by."""
    return part.group, part.layer, scheme


def read_losses(path: Path, fingerprint: str, *, search: bool) -> Losses | None:
    """What the file ``path`` holds of this checkpoint; ``None`` where there is none.

    Raises:
        SourceError: something else than such a file.
        UsageError: measurements of another checkpoint, or with scales of another kind.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SourceError(f"cannot read the sensitivities {path}: {error.strerror}") from error
    document = parse_object(raw, str(path))
    if document.get(_KEY) != VERSION:
        raise SourceError(
            f"{path}: no sensitivities of version {VERSION}: {_KEY} is {document.get(_KEY)!r}; name another file"
        )
    try:
        losses = Losses(
            path=path,
            fingerprint=str(document["checkpoint"]),
            text=_mapping(document["text"]),
            search=_boolean(document["search"]),
            found=dict(map(_measured, document["measured"])),
            together=dict(map(_together, document["together"])),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise SourceError(f"{path}: damaged sensitivities ({error!r}); remove it to measure anew") from None
    if losses.fingerprint != fingerprint:
        raise UsageError(
            f"{path} was measured on other weights: fingerprint {losses.fingerprint}, these have {fingerprint}; "
            "name another file with --sensitivities"
        )
    if losses.search != search:
        how = ("with", "without") if losses.search else ("without", "with")
        raise UsageError(
            f"{path} was measured {how[0]} searched scales, and this conversion is {how[1]} them: name another file "
            "with --sensitivities, or give the same --search and --method"
        )
    return losses


def _measured(entry: Any) -> tuple[Key, Loss]:
    group, layer, scheme = _text(entry["group"]), entry["layer"], _text(entry["scheme"])
    if type(layer) is not int or layer < 0:
        raise ValueError(f"layer is {layer!r}")
    return (group, layer, scheme), _loss(entry)


def _together(entry: Any) -> tuple[str, Together]:
    return _text(entry["scheme"]), Together(loss=_loss(entry), alone=_number(entry, "alone"))


def _loss(entry: Any) -> Loss:
    return Loss(kl=_number(entry, "kl"), low=_number(entry, "low"), high=_number(entry, "high"))


def _number(entry: Any, name: str) -> float:
    value = entry[name]
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}")
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{value!r} is no object")
    return value


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{value!r} is neither true nor false")
    return value
