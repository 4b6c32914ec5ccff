"""What engines were seen to make of a format is what says most of it, and contradictions are errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.proofs import Proofs, Result, add, merge


def proofs_of(*results: Result, version: str = "1") -> Proofs:
    proofs: Proofs = {}
    for result in results:
        add(proofs, written="--scheme x", what="linears", engine="e", version=version, result=result, test=result)
    return proofs


def result_of(proofs: Proofs) -> str:
    return proofs["--scheme x"]["linears"]["e"]["result"]


@pytest.mark.parametrize("results", [("right", "loads right"), ("loads right", "right"), ("right", "right")])
def test_kernels_that_compute_right_say_more_than_weights_that_load_right(
    tmp_path: Path, results: tuple[Result, Result]
) -> None:
    assert result_of(proofs_of(*results)) == "right"
    for result in results:
        merge(tmp_path / "proofs.json", proofs_of(result))
    assert result_of(json.loads((tmp_path / "proofs.json").read_text())) == "right"


def test_another_version_says_nothing_of_the_last_one(tmp_path: Path) -> None:
    merge(tmp_path / "proofs.json", proofs_of("right"))
    merge(tmp_path / "proofs.json", proofs_of("loads right", version="2"))
    assert result_of(json.loads((tmp_path / "proofs.json").read_text())) == "loads right"


@pytest.mark.parametrize("results", [("right", "refused"), ("loads right", "wrong"), ("refused", "wrong")])
def test_contradictions_are_errors(results: tuple[Result, Result]) -> None:
    with pytest.raises(ValueError, match=f"says {results[1]}, .* says {results[0]}"):
        proofs_of(*results)
