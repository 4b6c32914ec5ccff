"""Hidden states that outlive a comparison, so that other runs can begin in the middle of it, and a folder for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qconvert.core.errors import OutputError, UsageError
from reference_model.layerwise import HiddenStates
from reference_model.load import ActivationStore


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptStates:
    """What the converted model as served had before each layer, and the original at the end, of ``count`` batches."""

    store: ActivationStore
    count: int

    def before(self, layer: int) -> HiddenStates:
        """Inputs [B, T, D] of ``layer``; those of the layer behind the last are its outputs."""
        return HiddenStates(store=self.store, count=self.count, name=f"before.{layer}")

    @property
    def original(self) -> HiddenStates:
        """The original's hidden states after the final norm."""
        return HiddenStates(store=self.store, count=self.count, name="original")

    def keep(self, hidden: HiddenStates, place: HiddenStates) -> None:
        """Put all batches of ``hidden`` into ``place``, one of the two above."""
        for b in range(self.count):
            place.put(b, hidden[b])


@dataclass(frozen=True, slots=True, kw_only=True)
class StateFolder:
    """An ``ActivationStore`` in a folder, a file a tensor: a later process finds what was put there."""

    folder: Path

    def put(self, key: str, value: Tensor) -> None:
        """Write ``value``, visible whole or not at all.

        Raises:
            OutputError: the folder cannot be written.
        """
        partial = self.folder / f"{key}.partial"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file({"tensor": value.contiguous()}, partial)
            partial.replace(self.folder / key)
        except (OSError, SafetensorError) as error:
            raise OutputError(f"cannot keep {key} in {self.folder}: {error}") from error

    def get(self, key: str) -> Tensor:
        """The tensor under ``key``, bit for bit.

        Raises:
            KeyError: there is none.
            UsageError: the file cannot be read.
        """
        if not self.holds(key):
            raise KeyError(key)
        try:
            return load_file(self.folder / key)["tensor"]
        except (OSError, SafetensorError, KeyError) as error:
            raise UsageError(f"cannot read {self.folder / key}: {error}; remove the folder and start over") from error

    def drop(self, key: str) -> None:
        """Remove the file.

        Raises:
            KeyError: there is none.
        """
        if not self.holds(key):
            raise KeyError(key)
        (self.folder / key).unlink()

    def holds(self, key: str) -> bool:
        """Whether there is a tensor under ``key``."""
        return (self.folder / key).is_file()
