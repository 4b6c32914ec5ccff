"""Every way that a source can be damaged is one error that names the file, and leaves no file open."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qconvert.core.errors import SourceError
from qconvert.io.checkpoint import Checkpoint
from tests.checkpoints import make_tiny

INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"


def edit_index(path: Path, change: Callable[[dict[str, str]], None]) -> None:
    index = json.loads((path / INDEX).read_text())
    change(index["weight_map"])
    (path / INDEX).write_text(json.dumps(index))


def name_elsewhere(where: str) -> Callable[[Path], None]:
    return lambda path: edit_index(path, lambda names: names.update({"lm_head.weight": where}))


def truncate(path: Path) -> None:
    os.truncate(path / SECOND, (path / SECOND).stat().st_size - 1)


def grow(path: Path) -> None:
    with (path / SECOND).open("ab") as file:
        file.write(b"x")


def replace(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        (path / name).unlink()
        make(path / name)

    return change


def overlap(path: Path) -> None:
    raw = (path / FIRST).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    a, b = sorted((name for name in header if name != "__metadata__"), key=lambda n: header[n]["data_offsets"])[:2]
    size = header[b]["data_offsets"][1] - header[b]["data_offsets"][0]
    begin = header[a]["data_offsets"][1] - 2
    header[b]["data_offsets"] = [begin, begin + size]
    text = json.dumps(header).encode()
    (path / FIRST).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def twice(path: Path) -> None:
    make_tiny(path, shards=1)
    (path / "model.safetensors").replace(path / SECOND)


def no_index(path: Path) -> None:
    (path / INDEX).unlink()


def stale_single(path: Path) -> None:
    save_file({"a": torch.zeros(1)}, path / "model.safetensors")


def pickled(path: Path) -> None:
    for file in (INDEX, FIRST, SECOND):
        (path / file).unlink()
    (path / "pytorch_model.bin").write_bytes(b"\x80\x02")


def nothing(path: Path) -> None:
    for file in (INDEX, FIRST, SECOND):
        (path / file).unlink()


def unnamed(path: Path) -> None:
    edit_index(path, lambda names: names.pop("lm_head.weight") and None)


def swapped(path: Path) -> None:
    def change(names: dict[str, str]) -> None:
        first = next(name for name, shard in names.items() if shard == FIRST)
        names[first] = SECOND

    edit_index(path, change)


DAMAGE: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "truncated shard": (truncate, (SECOND, "truncated inside '", "expected", "found")),
    "shard with a tail": (grow, (SECOND, "1 bytes after the last tensor")),
    "empty shard": (replace(SECOND, Path.touch), (SECOND, "at least 8 bytes, found 0")),
    "overlapping offsets": (overlap, (FIRST, "inside '")),
    "a tensor in two shards": (twice, (FIRST, SECOND, "' is in ")),
    "a shard that is missing": (replace(SECOND, lambda path: None), (SECOND, "No such file")),
    "a shard that is a folder": (replace(SECOND, Path.mkdir), (SECOND, "found a folder")),
    "a shard that is a pipe": (replace(SECOND, os.mkfifo), (SECOND, "found a pipe")),
    "a link to nowhere": (replace(SECOND, lambda path: path.symlink_to("../gone")), (SECOND, "link leads nowhere")),
    "a link to itself": (replace(SECOND, lambda path: path.symlink_to(path.name)), (SECOND, "cannot read")),
    "a page of a web site": (
        replace(SECOND, lambda p: p.write_text("<html>" * 99)),
        (SECOND, "no safetensors"),
    ),
    "a pointer of git lfs": (replace(SECOND, lambda p: p.write_text("version https://")), (SECOND, "no safetensors")),
    "index names a missing file": (name_elsewhere("model-3.safetensors"), ("model-3.safetensors", "No such file")),
    "index names the parent": (name_elsewhere("../x.safetensors"), (INDEX, "lm_head.weight", "../x.safetensors")),
    "index names a subfolder": (name_elsewhere("a/x.safetensors"), (INDEX, "lm_head.weight", "a/x.safetensors")),
    "index names a root path": (name_elsewhere("/x.safetensors"), (INDEX, "lm_head.weight", "/x.safetensors")),
    "index names a drive": (name_elsewhere("c:x.safetensors"), (INDEX, "lm_head.weight", "c:x.safetensors")),
    "index names a backslash": (name_elsewhere("..\\x.safetensors"), (INDEX, "lm_head.weight")),
    "index names a zero byte": (name_elsewhere("x\0.safetensors"), (INDEX, "lm_head.weight")),
    "index names a pickle": (name_elsewhere("pytorch_model.bin"), (INDEX, "lm_head.weight", "pytorch_model.bin")),
    "index names the folder": (name_elsewhere(".."), (INDEX, "lm_head.weight")),
    "index maps to a number": (lambda p: edit_index(p, lambda n: n.update({"w": 1})), (INDEX, "'w'")),  # type: ignore[dict-item]
    "index names an absent tensor": (lambda p: edit_index(p, lambda n: n.update({"w": FIRST})), (INDEX, "'w'", FIRST)),
    "index forgets a tensor": (unnamed, (INDEX, "does not name 'lm_head.weight'")),
    "index names the wrong shard": (swapped, (INDEX, f"should be in {SECOND}, but is in {FIRST}")),
    "index without a map": (replace(INDEX, lambda p: p.write_text("{}")), (INDEX, "weight_map")),
    "index of a list": (replace(INDEX, lambda p: p.write_text("[]")), (INDEX, "JSON object")),
    "index that is no JSON": (replace(INDEX, lambda p: p.write_text("{")), (INDEX, "not JSON")),
    "index with a name twice": (
        replace(INDEX, lambda p: p.write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}')),
        (INDEX, "'a' occurs twice"),
    ),
    "index that is a folder": (replace(INDEX, Path.mkdir), (INDEX, "found a folder")),
    "several files, no index": (no_index, ("2 .safetensors files", INDEX)),
    "a single file beside the index": (stale_single, ("model.safetensors", "stale")),
    "pickles": (pickled, ("pickled (pytorch_model.bin)",)),
    "no weights": (nothing, ("no checkpoint",)),
    "no config": (replace("config.json", lambda path: None), ("config.json", "No such file")),
    "config that is no JSON": (replace("config.json", lambda p: p.write_text("{'a': 1}")), ("config.json", "not JSON")),
    "config in another encoding": (
        replace("config.json", lambda p: p.write_bytes('{"a": 1}'.encode("utf-16"))),
        ("config.json", "not UTF-8"),
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_error_and_closes_what_it_opened(tmp_path: Path, damage: str) -> None:
    make_tiny(tmp_path / "source", layers=1, mtp=False, vision=False)
    change, expected = DAMAGE[damage]
    change(tmp_path / "source")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(SourceError) as caught:
        Checkpoint.open(tmp_path / "source")
    assert len(os.listdir("/proc/self/fd")) == before
    assert str(tmp_path / "source") in str(caught.value)
    for part in expected:
        assert part in str(caught.value)


def test_a_file_or_nothing_in_place_of_the_folder(tmp_path: Path) -> None:
    make_tiny(tmp_path / "source", shards=1, layers=1, mtp=False, vision=False)
    with pytest.raises(SourceError, match="give the folder that it is in"):
        Checkpoint.open(tmp_path / "source" / "model.safetensors")
    with pytest.raises(SourceError, match="no such folder"):
        Checkpoint.open(tmp_path / "elsewhere")
