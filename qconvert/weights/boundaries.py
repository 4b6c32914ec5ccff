"""What models have come to after a layer, on disk: a run that was killed goes on from there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qconvert.core.errors import OutputError, SourceError, UsageError
from qconvert.io.disk import sync_file
from qconvert.io.file_record import record_file
from qconvert.io.hashing import XXH3

FORMAT = 2
"""Of what is kept: another number where a build keeps something else under the same names; the first had none."""

_PREFIX = "layer-"
_RUN = "run.json"
_PARTIAL = "run.json.partial"
_HASHES = "hashes.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Boundaries:
    """A folder of a run's own, with one folder for the last layer that was finished.

    Attributes:
        folder: made when there is something to keep.
        identity: of the run; states of another one are refused.
        advice: what to do about them, for people.
    """

    folder: Path
    identity: str
    advice: str = "give another folder for --work, or remove it"

    def load(self) -> tuple[int, Callable[[str], Tensor]] | None:
        """The layer that comes next, and a function that reads what was kept, by name; ``None`` at the beginning.

        Raises:
            UsageError: the folder holds another run, or something else.
        """
        if not self.folder.exists():
            return None
        # killed before anything was kept, a run leaves the first half of its own name
        if not {path.name for path in self.folder.iterdir()} - {_PARTIAL}:
            return None
        if self._whose() != self.identity:
            raise UsageError(
                f"{self.folder} holds the states of another run (other checkpoints, tokens or options), or "
                f"something else; {self.advice}"
            )
        layers = [path for path in self.folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit()]
        if not layers:
            return None
        last = max(layers)
        return int(last.name.removeprefix(_PREFIX)), lambda name: _read(last / name)

    def _whose(self) -> str | None:
        """The identity of the run whose states are there; ``None`` of no run that keeps what this one does."""
        try:
            found = json.loads((self.folder / _RUN).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            return None
        identity = found.get("identity")
        return identity if isinstance(identity, str) else None

    def claim(self) -> None:
        """Mark the folder as this run's, before anything but layers is kept in it.

        Raises:
            OutputError: the folder cannot be written.
        """
        try:
            self._write_name()
        except OSError as error:
            raise OutputError(f"cannot keep states in {self.folder}: {error}") from error

    def save(self, layer: int, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Keep what comes before ``layer``, in place of what was kept: one file a tensor, durable and visible at once.

        Raises:
            OutputError: the folder cannot be written.
        """
        place = self.folder / f"{_PREFIX}{layer:05}"
        partial = place.with_suffix(".partial")
        try:
            self._write_name()
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            hashes = {}
            for name, tensor in tensors:
                save_file({"tensor": tensor.contiguous()}, partial / name)
                sync_file(partial / name)
                hashes[name] = record_file(partial / name, XXH3).digest
            (partial / _HASHES).write_text(json.dumps(hashes), encoding="utf-8")
            sync_file(partial / _HASHES)
            sync_file(partial)
            shutil.rmtree(place, ignore_errors=True)
            partial.rename(place)
            sync_file(self.folder)
            for old in self.folder.glob(f"{_PREFIX}*"):
                if old != place:
                    shutil.rmtree(old)
        except (OSError, SafetensorError) as error:
            raise OutputError(f"cannot keep the states before layer {layer} in {self.folder}: {error}") from error

    def _write_name(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        beside = self.folder / _PARTIAL
        beside.write_text(json.dumps({"format": FORMAT, "identity": self.identity}), encoding="utf-8")
        beside.replace(self.folder / _RUN)

    def clear(self) -> None:
        """Remove what was kept: the run is over."""
        for path in self.folder.glob(f"{_PREFIX}*"):
            shutil.rmtree(path)
        for name in (_RUN, _PARTIAL):
            (self.folder / name).unlink(missing_ok=True)

    def remove(self, *, foreign: bool = False) -> None:
        """The same, and the folder if nothing else is in it; what another run has kept only if ``foreign``.

        What cannot be removed is no fault of a run that is over.
        """
        with suppress(OSError):
            if not foreign and self._whose() != self.identity:
                return
            self.clear()
            self.folder.rmdir()


def states_beside(out: Path, identity: Mapping[str, Any]) -> Boundaries:
    """Where a run that makes the folder ``out`` keeps what is between two layers: there is no room for it inside."""
    return Boundaries(
        folder=out.parent / f".{out.name}.states",
        identity=identity_hash(identity),
        advice="start over with --fresh, or remove it",
    )


def identity_hash(identity: Mapping[str, Any]) -> str:
    """xxh3-128 of what a run is, plain JSON."""
    return xxhash.xxh3_128_hexdigest(json.dumps(identity, sort_keys=True).encode())


def _read(path: Path) -> Tensor:
    try:
        expected = json.loads((path.parent / _HASHES).read_text(encoding="utf-8"))[path.name]
        found = record_file(path, XXH3).digest
        if found != expected:
            raise ValueError(f"its hash is {found}, not {expected}")
        return load_file(path)["tensor"]
    except (OSError, SafetensorError, SourceError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {error}; remove {path.parent.parent} and start over") from error
