"""A checkpoint is read as it is stored, from every kind of folder that people have, and nothing is mapped."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from qconvert.core.errors import SourceError
from qconvert.io.checkpoint import Checkpoint
from tests.checkpoints import make_tiny


def stored(path: Path) -> dict[str, Tensor]:
    return {k: v for shard in sorted(path.glob("*.safetensors")) for k, v in load_file(shard).items()}


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and a.contiguous().view(-1).view(torch.uint8).equal(b.contiguous().view(-1).view(torch.uint8))
    )


def folder(path: Path, tensors: dict[str, Tensor]) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text('{"model_type": "any"}')
    save_file(tensors, path / "model.safetensors")
    return path


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, dict[str, Tensor]]:
    gen = torch.Generator().manual_seed(0)
    tensors = {
        "stacked": torch.randn(3, 4, 5, generator=gen).to(torch.bfloat16),
        "matrix": torch.randn(7, 6, generator=gen),
        "vector": torch.randn(9, generator=gen).to(torch.float16),
        "scalar": torch.tensor(4, dtype=torch.int64),
        "pixels": torch.randn(2, 3, 2, 4, 5, generator=gen),
        "codes": torch.randint(0, 255, (5, 3), dtype=torch.uint8, generator=gen),
        "fp8": torch.randn(4, 3, generator=gen).to(torch.float8_e4m3fn),
        "empty": torch.empty(0, 8),
        "thin": torch.empty(8, 0),
        "truths": torch.tensor([True, False, True]),
    }
    return Checkpoint.open(folder(tmp_path_factory.mktemp("mixed"), tensors)), tensors


def test_whole_tensors_of_every_kind(mixed: tuple[Checkpoint, dict[str, Tensor]]) -> None:
    checkpoint, tensors = mixed
    assert set(checkpoint.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert same_bytes(checkpoint.read(name), tensor), name


@given(data=st.data())
def test_rows_are_counted_over_all_leading_dimensions(
    mixed: tuple[Checkpoint, dict[str, Tensor]], data: st.DataObject
) -> None:
    checkpoint, tensors = mixed
    name = data.draw(st.sampled_from(["stacked", "matrix", "pixels", "vector", "codes", "fp8", "empty", "truths"]))
    flat = tensors[name] if tensors[name].dim() == 1 else tensors[name].flatten(0, -2)
    begin = data.draw(st.integers(0, len(flat)))
    end = data.draw(st.integers(begin, len(flat)))
    assert same_bytes(checkpoint.read(name, begin, end), flat[begin:end])
    assert same_bytes(checkpoint.read(name, begin), flat[begin:])


@pytest.mark.parametrize(("begin", "end"), [(-1, 2), (0, 13), (5, 4), (13, 13)])
def test_rows_outside_are_refused(mixed: tuple[Checkpoint, dict[str, Tensor]], begin: int, end: int) -> None:
    with pytest.raises(IndexError, match="stacked has 12 rows"):
        mixed[0].read("stacked", begin, end)


def test_a_buffer_is_filled_in_place_and_used_again(mixed: tuple[Checkpoint, dict[str, Tensor]]) -> None:
    checkpoint, tensors = mixed
    buffer = torch.empty(400, dtype=torch.uint8)
    first = checkpoint.read("matrix", buffer=buffer)
    assert same_bytes(first, tensors["matrix"])
    assert first.data_ptr() == buffer.data_ptr()
    second = checkpoint.read("stacked", 4, 8, buffer=buffer)
    assert same_bytes(second, tensors["stacked"][1])
    assert second.data_ptr() == buffer.data_ptr()


@pytest.mark.parametrize(
    "buffer", [torch.empty(10, dtype=torch.uint8), torch.empty(400), torch.empty(20, 20, dtype=torch.uint8)]
)
def test_a_buffer_that_does_not_fit_is_refused(mixed: tuple[Checkpoint, dict[str, Tensor]], buffer: Tensor) -> None:
    with pytest.raises(IndexError, match="168 bytes of matrix need"):
        mixed[0].read("matrix", buffer=buffer)


def test_an_unknown_tensor_is_named(mixed: tuple[Checkpoint, dict[str, Tensor]]) -> None:
    with pytest.raises(SourceError, match="no tensor 'nobody'"):
        mixed[0].read("nobody")


def hub_cache(path: Path) -> Path:
    """Turn a folder into a snapshot of the hub's cache: links into a folder of blobs."""
    blobs, snapshot = path.parent / "blobs", path.parent / "snapshots" / "0123"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(path.iterdir())):
        file.rename(blobs / f"{number:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    return snapshot


def one_file_of_another_name(path: Path) -> Path:
    (path / "model.safetensors").rename(path / "weights.safetensors")
    return path


def index_of_one(path: Path) -> Path:
    weight_map = dict.fromkeys(stored(path), "model.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("shards", "change"),
    [(3, Path), (1, Path), (1, one_file_of_another_name), (1, index_of_one), (2, hub_cache), (1, hub_cache)],
    ids=["sharded", "single", "single of another name", "single with index", "hub cache", "hub cache, single"],
)
def test_folders_as_people_have_them(
    tmp_path: Path, shards: int, change: Callable[[Path], Path], dtype: torch.dtype
) -> None:
    make_tiny(tmp_path / "source", shards=shards, dtype=dtype)
    expected = stored(tmp_path / "source")
    path = change(tmp_path / "source")
    with Checkpoint.open(path) as checkpoint:
        assert set(checkpoint.tensors) == set(expected)
        assert all(same_bytes(checkpoint.read(name), tensor) for name, tensor in expected.items())
        assert checkpoint.config == json.loads((path / "config.json").read_text())


def test_tensors_come_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    make_tiny(tmp_path, shards=3)
    checkpoint = Checkpoint.open(str(tmp_path))
    places = [(info.shard, info.begin) for info in checkpoint.tensors.values()]
    assert places == sorted(places)


def test_the_hash_knows_headers_config_and_sizes_but_not_the_folder(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(4), "b": torch.zeros(2, 3)}
    first = Checkpoint.open(folder(tmp_path / "one", tensors)).header_hash
    assert len(first) == 32
    assert Checkpoint.open(folder(tmp_path / "two", tensors)).header_hash == first
    assert Checkpoint.open(folder(tmp_path / "three", {**tensors, "b": torch.zeros(3, 2)})).header_hash != first
    (tmp_path / "two" / "config.json").write_text("{}")
    assert Checkpoint.open(tmp_path / "two").header_hash != first


def test_opening_reads_no_weights(tmp_path: Path) -> None:
    path = folder(tmp_path / "sparse", {"a": torch.zeros(4)})
    size = 1 << 40
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with (path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    with Checkpoint.open(path) as checkpoint:
        assert not checkpoint.read("w", size - 1000).any()


def test_a_file_that_shrinks_is_an_error_not_a_crash(tmp_path: Path) -> None:
    path = folder(tmp_path / "c", {"a": torch.zeros(100), "b": torch.ones(1000, 3)})
    with Checkpoint.open(path) as checkpoint:
        os.truncate(path / "model.safetensors", checkpoint.tensors["b"].begin + 24)
        assert checkpoint.read("b", 0, 2).eq(1).all()
        with pytest.raises(SourceError, match=r"model.safetensors: 'b': the file shrank"):
            checkpoint.read("b")


def test_a_disk_that_fails_is_an_error_with_file_and_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    with Checkpoint.open(folder(tmp_path / "c", {"a": torch.zeros(3)})) as checkpoint:
        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(SourceError, match=r"model.safetensors: 'a': cannot read: Input/output error"):
            checkpoint.read("a")


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.preadv
    with Checkpoint.open(folder(tmp_path / "c", {"a": torch.arange(50.0)})) as checkpoint:
        monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: whole(fd, [buffers[0][:7]], offset))
        assert checkpoint.read("a").equal(torch.arange(50.0))


def test_threads_read_without_disturbing_each_other(mixed: tuple[Checkpoint, dict[str, Tensor]]) -> None:
    checkpoint, tensors = mixed
    start = threading.Barrier(4)

    def work(seed: int) -> bool:
        start.wait()
        names = ["stacked", "matrix", "pixels"] * 50
        return all(same_bytes(checkpoint.read(name), tensors[name]) for name in names[seed:])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_closing_closes_every_file(tmp_path: Path) -> None:
    make_tiny(tmp_path, shards=3)
    before = set(os.listdir("/proc/self/fd"))
    with Checkpoint.open(tmp_path):
        assert len(os.listdir("/proc/self/fd")) >= len(before) + 3
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_what_comes_along_and_what_stays_behind(tmp_path: Path) -> None:
    path = folder(tmp_path / "c", {"a": torch.zeros(3)})
    along = ["tokenizer.json", "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json", "LICENSE"]
    behind = {
        "README.md": "describes the source",
        "modeling.py": "code",
        "training_args.bin": "pickled",
        "model.gguf": "another format",
        "extra.safetensors": "the index does not name",
        ".gitattributes": "hidden",
        "hf_quant_config.json": "quantization",
        "pytorch_model.bin.index.json": "index of other weights",
    }
    for name in (*along, *behind):
        (path / name).write_text("x" * len(name))
    (path / "original").mkdir()
    os.mkfifo(path / "pipe.json")
    with Checkpoint.open(path) as checkpoint:
        assert {file.name: file.nbytes for file in checkpoint.side_files} == {name: len(name) for name in along}
        left = dict(checkpoint.left_out)
    assert left.pop("original") == "a folder, not a file"
    assert left.pop("pipe.json") == "a pipe, not a file"
    assert left.keys() == behind.keys()
    assert all(behind[name] in reason for name, reason in left.items())
