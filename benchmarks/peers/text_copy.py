"""A checkpoint's text decoder by itself, for tools that take a model with a vision tower for another kind."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer


@contextmanager
def text_copy(source: str, beside: str) -> Iterator[str]:
    """The text decoder of ``source`` as transformers writes it, in a folder for the time being, beside an output."""
    with tempfile.TemporaryDirectory(dir=Path(beside).parent) as folder:
        AutoModelForCausalLM.from_pretrained(source, dtype="auto", device_map="cpu").save_pretrained(folder)
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
        yield folder
