"""What models are run on: text files, conversations, token ids."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from torch import Tensor

from qconvert.core.errors import SourceError, UsageError
from qconvert.io.strict_json import parse_object
from qconvert.texts.template import TOKENIZER, TOKENIZER_CONFIG, chat_template

_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A file of text, and the domain that its numbers are reported under.

    ``.npy`` holds token ids, integers [T] or one document a row; ``.jsonl`` one document a line, an object with
    ``messages`` (for the checkpoint's chat template), ``text`` or ``token_ids``; anything else is UTF-8 text, one
    document.
    """

    name: str
    path: Path

    @classmethod
    def parse(cls, argument: str) -> Text:
        """``NAME=FILE``, or a file whose name without its ending is the domain's.

        Raises:
            UsageError: the name or the file is empty.
        """
        name, equals, path = argument.partition("=")
        if not equals or "/" in name or Path(argument).exists():
            name, path = Path(argument).stem, argument
        if not name.strip() or not path.strip():
            raise UsageError(f"the text {argument!r} is not understood; give FILE or NAME=FILE")
        return cls(name=name, path=Path(path))


class Reader:
    """Reads documents as token ids with the tokenizer and the chat template of one checkpoint, each when needed."""

    def __init__(self, model: Path) -> None:
        """``model``: the checkpoint's folder."""
        self._model = model
        self._loaded: Tokenizer | None = None

    def documents(self, text: Text) -> Iterator[Tensor]:
        """Token ids int64 [T] of each document of a file.

        Raises:
            UsageError: the file cannot be read or holds something else, or the checkpoint has no tokenizer or no chat
                template for it.
            SourceError: the tokenizer or the chat template cannot be read.
        """
        if text.path.suffix == ".npy":
            yield from _stored_ids(text.path)
            return
        content = _content(text.path)
        if text.path.suffix != ".jsonl":
            yield self._encode(content, special=True)
            return
        for number, line in enumerate(content.splitlines(), start=1):
            if line.strip():
                yield self._document(line, f"{text.path}, line {number}")

    def _document(self, line: str, where: str) -> Tensor:
        try:
            row = parse_object(line.encode(), where)
        except SourceError as error:
            raise UsageError(str(error)) from error
        if isinstance(row.get("token_ids"), list):
            return _ids(row["token_ids"], where)
        if isinstance(row.get("messages"), list):
            return self._encode(self._conversation(row["messages"], where), special=False)
        if isinstance(row.get("text"), str):
            return self._encode(row["text"], special=True)
        raise UsageError(f"{where}: expected an object with messages, text or token_ids")

    def _encode(self, content: str, *, special: bool) -> Tensor:
        return torch.tensor(self._tokenizer().encode(content, add_special_tokens=special).ids, dtype=torch.int64)

    def _tokenizer(self) -> Tokenizer:
        path = self._model / TOKENIZER
        if self._loaded is None:
            if not path.is_file():
                raise UsageError(
                    f"{self._model} has no {TOKENIZER} to read a text with: give token ids "
                    "(.npy, or token_ids in .jsonl)"
                )
            try:
                # unlike from_file this raises a narrow error
                self._loaded = Tokenizer.from_buffer(path.read_bytes())
            except (OSError, ValueError) as error:
                raise SourceError(f"cannot read {path}: {error}") from error
        return self._loaded

    def _conversation(self, messages: Sequence[Any], where: str) -> str:
        template = chat_template(self._model)
        if template is None:
            raise UsageError(f"{where}: {self._model} has no chat template for messages; give text or token_ids")
        try:
            return (
                _environment()
                .from_string(template)
                .render(messages=messages, add_generation_prompt=False, **self._special_tokens())
            )
        except (TemplateError, TypeError, ValueError, OverflowError) as error:
            raise UsageError(f"{where}: the chat template of {self._model} does not take it: {error}") from error

    def _special_tokens(self) -> dict[str, str]:
        path = self._model / TOKENIZER_CONFIG
        if not path.is_file():
            return {}
        known = parse_object(path.read_bytes(), path.name)
        named = {name: known.get(name) for name in _TOKENS}
        plain = {name: one.get("content") if isinstance(one, dict) else one for name, one in named.items()}
        return {name: one for name, one in plain.items() if isinstance(one, str)}


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as chat templates expect it (transformers, ``apply_chat_template``); templates come with checkpoints."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _content(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the text {path}: {error}") from error


def _stored_ids(path: Path) -> Iterator[Tensor]:
    try:
        rows = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read the token ids {path}: {error}") from error
    if not isinstance(rows, np.ndarray) or rows.dtype.kind not in "iu" or rows.ndim not in (1, 2):
        raise UsageError(f"{path}: expected integers [tokens] or [documents, tokens]")
    for row in np.atleast_2d(rows):
        yield torch.from_numpy(row.astype(np.int64))


def _ids(values: Sequence[Any], where: str) -> Tensor:
    if not all(type(value) is int and 0 <= value < 2**31 for value in values):
        raise UsageError(f"{where}: token_ids are not whole numbers from 0")
    return torch.tensor(values, dtype=torch.int64)
