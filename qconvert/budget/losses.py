"""What was measured, as a file: the loss of each part in each scheme, by itself, on which text of which checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qconvert import __version__
from qconvert.budget.parts import Part
from qconvert.core.errors import SourceError, UsageError
from qconvert.io.disk import disk_errors, sync_file
from qconvert.io.strict_json import parse_object
from qconvert.parity.outputs.folder import replace_text

VERSION = 1
_KEY = "qconvert_sensitivities"


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """Mean KL(original || original with one part rounded), nats; ``low`` to ``high`` is its 95% interval."""

    kl: float
    low: float
    high: float


Key = tuple[str, int, str]
"""Group, layer and name of the scheme."""


@dataclass(slots=True, kw_only=True)
class Losses:
    """The measurements of one checkpoint on one text.

    Attributes:
        path: where they are kept.
        fingerprint: of the checkpoint, see ``io/fingerprint.py``.
        text: where the tokens come from, see ``CalibrationWindows``.
        search: whether scales were searched.
        found: what is known so far.
    """

    path: Path
    fingerprint: str
    text: Mapping[str, Any]
    search: bool
    found: dict[Key, Loss] = field(default_factory=dict)

    def missing(self, parts: Iterable[Part]) -> list[tuple[Part, str]]:
        """Parts and names of schemes that are not measured."""
        return [(part, name) for part in parts for name in part.schemes if key(part, name) not in self.found]

    def of(self, part: Part, scheme: str | None) -> float:
        """What a part costs in a scheme; nothing where it stays.

        Raises:
            KeyError: it is not measured.
        """
        return 0.0 if scheme is None else self.found[key(part, scheme)].kl

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
    kl, low, high = (entry[name] for name in ("kl", "low", "high"))
    if type(layer) is not int or layer < 0:
        raise ValueError(f"layer is {layer!r}")
    if not all(type(one) in (int, float) and math.isfinite(one) for one in (kl, low, high)):
        raise ValueError(f"kl is {kl!r}, low {low!r}, high {high!r}")
    return (group, layer, scheme), Loss(kl=float(kl), low=float(low), high=float(high))


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
