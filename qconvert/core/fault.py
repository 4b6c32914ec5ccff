"""Something in a file that is not as it should be."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault of many that are collected before they are reported.

    Attributes:
        file: name of the file inside its folder.
        tensor: the tensor that is concerned; ``None`` for the file as such.
        what: what was expected and found.
    """

    file: str
    tensor: str | None = None
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}" if self.tensor is None else f"{self.file}: {self.tensor!r}: {self.what}"
