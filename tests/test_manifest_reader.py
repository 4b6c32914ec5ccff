"""A manifest that was damaged, edited or made up is one error that names it; nothing in it is believed before."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qconvert.convert import convert
from qconvert.core.errors import QconvertError, SourceError
from qconvert.core.scheme import int4
from qconvert.manifest_reader import read_manifest
from qconvert.plan.policy import default_policy
from qconvert.verify import verify
from tests.checkpoints import make_tiny
from tests.manifests import edit_manifest, write_manifest


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    make_tiny(folder / "src", layers=1, experts=2, mtp=False, vision=False, shards=1)
    convert(folder / "src", folder / "out", default_policy(int4(32)))
    return folder / "out"


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "out")
    return tmp_path / "out"


def first(document: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = next(iter(document["tensors"].values()))
    return entry


Change = Callable[[dict[str, Any]], object]

LIES: dict[str, Change] = {
    "a hash that is not available": lambda d: d.update(hash="md5"),
    "a hash that is a list": lambda d: d.update(hash=["xxh3_128"]),
    "hashes of another kind": lambda d: d.update(hash="sha256"),
    "no version": lambda d: d.pop("qconvert"),
    "a version of control characters": lambda d: d.update(qconvert="\x1b[2J"),
    "a device that is a number": lambda d: d.update(device=0),
    "no policy": lambda d: d.pop("policy"),
    "decisions by name": lambda d: d.update(decisions={}),
    "a decision without a reason": lambda d: d["decisions"][0].pop("reason"),
    "a decision that counts in fractions": lambda d: d["decisions"][0].update(tensors=1.0),
    "a decision that counts to true": lambda d: d["decisions"][0].update(tensors=True),
    "a signal in words": lambda d: d["sqnr_db"].update(x="high"),
    "files in a list": lambda d: d.update(files=["config.json"]),
    "a file in the parent": lambda d: d["files"].update({"../x": d["files"]["config.json"]}),
    "a file at the root": lambda d: d["files"].update({"/etc/passwd": d["files"]["config.json"]}),
    "a file in a subfolder": lambda d: d["files"].update({"a/b": d["files"]["config.json"]}),
    "the folder itself": lambda d: d["files"].update({".": d["files"]["config.json"]}),
    "a file with a zero byte": lambda d: d["files"].update({"a\0b": d["files"]["config.json"]}),
    "the manifest itself": lambda d: d["files"].update({"manifest.json": d["files"]["config.json"]}),
    "a file of negative size": lambda d: d["files"]["config.json"].update(bytes=-1),
    "a file of absurd size": lambda d: d["files"]["config.json"].update(bytes=10**30),
    "a file without a hash": lambda d: d["files"]["config.json"].pop("hash"),
    "tensors without what they are": lambda d: first(d).clear(),
    "a tensor that is a list": lambda d: d["tensors"].update(x=[]),
    "a tensor of unknown type": lambda d: first(d).update(dtype="F4"),
    "a tensor whose type is an object": lambda d: first(d).update(dtype={}),
    "a tensor of negative shape": lambda d: first(d).update(shape=[-1]),
    "a tensor of infinite shape": lambda d: first(d).update(shape=[float("inf")]),
    "a tensor of absurd shape": lambda d: first(d).update(shape=[2**63]),
    "rows backwards": lambda d: first(d).update(rows=[2, 1]),
    "three rows": lambda d: first(d).update(rows=[1, 2, 3]),
    "a decision that nobody made": lambda d: first(d).update(decision=10**6),
    "a decision before the first": lambda d: first(d).update(decision=-1),
    "a source that is none": lambda d: first(d).update(source=None),
    "a short hash": lambda d: first(d).update(hash="00"),
    "a hash in capitals": lambda d: first(d).update(hash="A" * 32),
    "one more field": lambda d: first(d).update(more=1),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_one_error_though_the_seal_fits(out: Path, lie: str) -> None:
    edit_manifest(out, LIES[lie])
    with pytest.raises(SourceError, match=r"manifest\.json: not as qconvert writes it"):
        verify(out)


def test_sizes_and_shapes_that_are_not_so_are_faults(out: Path) -> None:
    edit_manifest(out, lambda d: (d["files"]["config.json"].update(bytes=2**62), first(d).update(shape=[2**62])))
    assert {fault.tensor is None for fault in verify(out).faults} == {True, False}


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{}",
        b"[]\n",
        b"\xff\xfe",
        b"{\n" + b'"a":[' * 100_000 + b"\n",
        b'{\n "tensors": {\n',
        b'{\n "tensors": {\n },\n "seal": ""\n}\n',
        b'{\n "a": 1,\n "a": 2,\n "tensors": {\n },\n',
        b'{\n "a": ' + b"[" * 100_000 + b',\n "tensors": {\n },\n',
        b'{\n "hash": "xxh3_128",\n "decisions": [],\n "tensors": {\n' + b"[" * 10_000 + b"\n },\n",
        b'{\n "a": ' + b"9" * 100_000 + b',\n "tensors": {\n },\n',
    ],
)
def test_what_is_no_manifest_is_one_error(out: Path, raw: bytes) -> None:
    (out / "manifest.json").write_bytes(raw)
    with pytest.raises(SourceError, match=r"manifest\.json"):
        verify(out)


@pytest.mark.parametrize("endless", ["a line", "lines"])
def test_a_manifest_without_an_end_takes_no_memory(out: Path, endless: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with (out / "manifest.json").open("wb") as file:
        if endless == "lines":
            file.write(b'{\n "tensors": {\n' + b"\n" * 1000)
        file.truncate(1 << 40)  # a hole: zeros that take no room
    tracemalloc.start()
    try:
        with pytest.raises(SourceError, match=r"manifest\.json"):
            read_manifest(out)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_a_manifest_that_is_laid_out_otherwise_vouches_for_nothing(out: Path) -> None:
    document = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(SourceError, match="not as qconvert writes it"):
        verify(out)
    write_manifest(out, document)
    assert verify(out).faults == ()


def test_an_edit_without_a_new_seal_is_refused(out: Path) -> None:
    text = (out / "manifest.json").read_text()
    (out / "manifest.json").write_text(text.replace("few bytes", "few bites"))
    with pytest.raises(SourceError, match=r"manifest\.json: does not fit the seal"):
        verify(out)


@pytest.mark.parametrize("kind", ["folder", "pipe", "link to nowhere"])
def test_a_manifest_that_is_no_file_is_one_error(out: Path, kind: str) -> None:
    path = out / "manifest.json"
    path.unlink()
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path)}.get(kind, lambda: path.symlink_to("gone"))()
    with pytest.raises(SourceError, match=r"manifest\.json"):
        verify(out)


BAD_RULES: tuple[Any, ...] = (
    [], {}, None, {"match": "*"}, {"match": 1, "keep": True}, {"match": "*", "keep": False},
    {"match": "*", "scheme": "int3"}, {"match": "*", "scheme": "int8-g32-sym"},
    {"match": "*", "scheme": "int4", "group": -1},
    {"match": "*", "keep": True, "layers": "0-99999999999"}, {"match": "*", "keep": True, "layers": [0]},
)  # fmt: skip


@pytest.mark.parametrize("rule", BAD_RULES)
def test_a_policy_that_no_file_can_hold_is_one_error(out: Path, rule: Any) -> None:
    edit_manifest(out, lambda d: d.update(policy=[rule]))
    assert verify(out).faults == ()
    with pytest.raises(SourceError, match=r"manifest\.json: policy, rule 1"):
        verify(out, out.parent)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150)
@given(data=st.data())
def test_any_value_anywhere_is_an_error_or_a_fault_or_makes_no_difference(made: Path, data: st.DataObject) -> None:
    path = made / "manifest.json"
    before = path.read_bytes()
    document = json.loads(before)
    block: Any = document
    while isinstance(block, (dict, list)) and block:
        parent = block
        key = data.draw(st.sampled_from(sorted(block) if isinstance(block, dict) else range(len(block))))
        block = block[key]
        if data.draw(st.booleans()):
            break
    parent[key] = data.draw(JSON)
    try:
        write_manifest(made, document if isinstance(document["tensors"], dict) else {**document, "tensors": {}})
        verify(made)
    except QconvertError as error:
        assert "manifest.json" in str(error)
    finally:
        path.write_bytes(before)
