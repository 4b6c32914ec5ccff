"""A source is a folder or a hub id; the hub's refusals become one error that carries no secret."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.errors
import pytest

from qconvert.core.errors import SourceError
from qconvert.io.hub import resolve

SECRET = "hf_" + "x" * 30


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []

    def download(repo_id: str, **options: Any) -> str:
        calls.append({"repo_id": repo_id, **options})
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return calls


def test_a_folder_is_taken_as_it_is(tmp_path: Path, asked: list[dict[str, Any]]) -> None:
    assert resolve(str(tmp_path)) == tmp_path
    assert asked == []


def test_a_folder_wins_over_a_hub_id(
    tmp_path: Path, asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "Qwen" / "Model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("Qwen/Model") == Path("Qwen/Model")
    assert asked == []


@pytest.mark.parametrize("revision", [None, "main", "refs/pr/7", "0123abc"])
def test_a_hub_id_is_downloaded_without_pickles_and_code(
    tmp_path: Path, asked: list[dict[str, Any]], revision: str | None
) -> None:
    source = "Qwen/Qwen3.5-35B-A3B" + (f"@{revision}" if revision else "")
    assert resolve(source) == tmp_path / "snapshot"
    assert asked == [
        {
            "repo_id": "Qwen/Qwen3.5-35B-A3B",
            "revision": revision,
            "allow_patterns": ["*.safetensors", "*.json", "*.txt", "*.jinja"],
        }
    ]


@pytest.mark.parametrize(
    "source", ["", "nowhere", "/no/such/folder", "../up", "a/b/c", "https://hub/a/b", "a/b@", "a b/c"]
)
def test_anything_else_is_refused_without_asking(asked: list[dict[str, Any]], source: str) -> None:
    with pytest.raises(SourceError, match="no such folder, and not a hub id"):
        resolve(source)
    assert asked == []


def http(kind: type[huggingface_hub.errors.HfHubHTTPError], status: int) -> Exception:
    error = kind.__new__(kind)
    Exception.__init__(error, f"{status} for url with Bearer {SECRET}")
    error.response = type("Response", (), {"status_code": status})()
    return error


FAILURES = {
    "gated": (http(huggingface_hub.errors.GatedRepoError, 403), "hf auth login"),
    "missing": (http(huggingface_hub.errors.RepositoryNotFoundError, 404), "no such repository"),
    "revision": (http(huggingface_hub.errors.RevisionNotFoundError, 404), "no such revision"),
    "server": (http(huggingface_hub.errors.HfHubHTTPError, 503), "HTTP status 503"),
    "offline": (huggingface_hub.errors.LocalEntryNotFoundError(f"offline {SECRET}"), "network"),
    "client": (
        next(b for b in huggingface_hub.errors.HfHubHTTPError.__mro__ if b.__name__ == "HTTPError")(SECRET),
        "network",
    ),
    "disk": (OSError(28, f"No space left on device {SECRET}"), "No space left on device"),
    "name": (huggingface_hub.errors.HFValidationError(SECRET), "HFValidationError"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_refusals_are_one_error_without_secrets(monkeypatch: pytest.MonkeyPatch, failure: str) -> None:
    error, expected = FAILURES[failure]

    def refuse(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(SourceError) as caught:
        resolve("org/name")
    assert expected in str(caught.value)
    assert "org/name" in str(caught.value)
    assert SECRET not in str(caught.value)
    assert caught.value.__suppress_context__
