"""JSON objects that mean one thing only: UTF-8, no key twice."""

from __future__ import annotations

import json
from typing import Any

from qconvert.core.errors import SourceError


class _DuplicateKeyError(ValueError):
    """A key that an object has twice."""


def parse_object(raw: bytes, where: str) -> dict[str, Any]:
    """Parse the JSON object ``raw``; ``where`` begins the message of an error.

    Raises:
        SourceError: not UTF-8, not JSON, nested too deeply, a key twice, or something else than an object.
    """
    try:
        parsed = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except _DuplicateKeyError as error:
        raise SourceError(f"{where}: the key {error} occurs twice; only one of them can be meant") from None
    except UnicodeDecodeError as error:
        raise SourceError(f"{where}: not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise SourceError(f"{where}: JSON is nested too deeply") from None
    except ValueError as error:
        raise SourceError(f"{where}: not JSON ({error})") from None
    if not isinstance(parsed, dict):
        raise SourceError(f"{where}: expected a JSON object, found {type(parsed).__name__}")
    return parsed


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKeyError(repr(key))
            seen.add(key)
    return found
