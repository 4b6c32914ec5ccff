"""Where a source is: a local folder, or a repository of the Hugging Face hub brought into its cache."""

from __future__ import annotations

import os
import re
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from qconvert.core.errors import SourceError

DOWNLOADED = ["*.safetensors", "*.json", "*.txt", "*.jinja"]
"""What conversions need; pickles and code stay where they are."""

# The HTTP client differs between releases of huggingface_hub; its base error is a base of the hub's own.
_FAILURES: tuple[type[Exception], ...] = (
    OSError,
    ValueError,
    EntryNotFoundError,
    *(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError" and issubclass(base, Exception)),
)

_HUB_ID = re.compile(r"(?P<repository>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?", re.ASCII)


def resolve(source: str) -> Path:
    """The folder of ``source``: a folder as it is, ``org/name`` or ``org/name@revision`` from the hub.

    Raises:
        SourceError: neither a folder nor a hub id, or the hub does not give it. Messages are ours alone: those of
            the hub's client may carry headers and addresses.
    """
    path = Path(source).expanduser()
    if source and os.path.lexists(path):
        return path
    match = _HUB_ID.fullmatch(source)
    if match is None:
        raise SourceError(f"{source}: no such folder, and not a hub id of the form org/name or org/name@revision")
    repository, revision = match["repository"], match["revision"]
    try:
        found = huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=DOWNLOADED)
    except _FAILURES as error:
        raise SourceError(f"{source}: no such folder, and the hub does not give it: {_reason(error)}") from None
    return Path(found)


def _reason(error: Exception) -> str:
    if isinstance(error, GatedRepoError):
        return "the repository is gated; accept its terms and log in with `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return "no such repository, or it is private and you are not logged in"
    if isinstance(error, RevisionNotFoundError):
        return "the repository has no such revision"
    if isinstance(error, HfHubHTTPError):
        return f"HTTP status {error.response.status_code}"
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return f"{type(error).__name__}; is the network reachable, is the snapshot in the cache?"
