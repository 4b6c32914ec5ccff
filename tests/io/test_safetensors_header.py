"""A header is what the reference implementation writes and reads, and anything else is refused by name."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from qconvert.core.dtypes import DType
from qconvert.core.errors import PlanError, SourceError
from qconvert.core.tensor_info import TensorInfo
from qconvert.io.safetensors_header import (
    LENGTH_BYTES,
    MAX_HEADER_BYTES,
    header_length,
    parse_header,
    serialize_header,
)

NAMES = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=20).filter(
    lambda name: name != "__metadata__"
)
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
TENSORS = st.dictionaries(NAMES, st.tuples(st.sampled_from(list(DType)), SHAPES), max_size=6)
METADATA = st.dictionaries(NAMES, st.text(st.characters(exclude_categories=("Cs",)), max_size=10), max_size=3)


def lay_out(tensors: dict[str, tuple[DType, tuple[int, ...]]]) -> list[TensorInfo]:
    infos, position = [], 0
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: -item[1][0].itemsize):
        end = position + dtype.itemsize * torch.Size(shape).numel()
        infos.append(TensorInfo(name=name, dtype=dtype, shape=shape, shard="a", begin=position, end=end))
        position = end
    return infos


def parse(raw: bytes, file_size: int | None = None) -> Any:
    size = len(raw) if file_size is None else file_size
    length = header_length(raw, size, "file")
    return parse_header(raw[LENGTH_BYTES : LENGTH_BYTES + length], size, shard="a", where="file")


@given(TENSORS, METADATA)
def test_what_is_written_is_read_back(
    tensors: dict[str, tuple[DType, tuple[int, ...]]], metadata: dict[str, str]
) -> None:
    infos = lay_out(tensors)
    raw = serialize_header(infos, metadata)
    header = parse(raw, len(raw) + sum(info.nbytes for info in infos))
    assert len(raw) % 8 == 0
    assert header.metadata == metadata
    assert header.data_begin == len(raw)
    found = {info.name: (info.dtype, info.shape, info.begin - len(raw), info.end - len(raw)) for info in header.tensors}
    assert found == {info.name: (info.dtype, info.shape, info.begin, info.end) for info in infos}


@given(TENSORS, METADATA)
def test_the_reference_implementation_reads_what_we_write(
    tensors: dict[str, tuple[DType, tuple[int, ...]]], metadata: dict[str, str]
) -> None:
    infos = lay_out(tensors)
    body = bytes(i % 2 for i in range(sum(info.nbytes for info in infos)))
    found = dict(safetensors.deserialize(serialize_header(infos, metadata) + body))
    assert set(found) == set(tensors)
    for info in infos:
        assert tuple(found[info.name]["shape"]) == info.shape
        assert found[info.name]["dtype"] == info.dtype.value
        assert bytes(found[info.name]["data"]) == body[info.begin : info.end]


@given(TENSORS, METADATA)
def test_we_read_what_the_reference_implementation_writes(
    tensors: dict[str, tuple[DType, tuple[int, ...]]], metadata: dict[str, str]
) -> None:
    written = {name: torch.zeros(shape, dtype=dtype.torch_dtype) for name, (dtype, shape) in tensors.items()}
    header = parse(safetensors.torch.save(written, metadata or None))
    assert {info.name: (info.dtype, info.shape) for info in header.tensors} == tensors
    assert header.metadata == metadata


def test_every_element_type_is_the_reference_implementations_own() -> None:
    for dtype in DType:
        tensor = torch.zeros(3, dtype=dtype.torch_dtype)
        assert parse(safetensors.torch.save({"t": tensor})).tensors[0].dtype is dtype


def test_metadata_comes_first_and_the_bytes_do_not_depend_on_the_order_given() -> None:
    infos = lay_out({"b": (DType.BF16, (2, 3)), "a": (DType.F32, (5,))})
    raw = serialize_header(infos, {"z": "1", "format": "pt"})
    assert raw == serialize_header(reversed(infos), {"format": "pt", "z": "1"})
    assert raw[LENGTH_BYTES:].startswith(b'{"__metadata__":{"format":"pt","z":"1"},"a":')


def raw_file(header: bytes | dict[str, Any], body: int = 0) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(body)


def entry(dtype: Any = "BF16", shape: Any = (2, 3), offsets: Any = (0, 12)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "at least 8 bytes"),
    "seven bytes": (b"\0" * 7, "at least 8 bytes"),
    "longer than the file": (struct.pack("<Q", 50) + b"{}", "truncated inside its header"),
    "longer than the cap": (struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}", "no safetensors file"),
    "an absurd length": (struct.pack("<Q", 2**64 - 1) + b"{}", "no safetensors file"),
    "no object": (raw_file(b"[]"), "does not begin with"),
    "leading space": (raw_file(b" {}"), "does not begin with"),
    "not JSON": (raw_file(b'{"a": }'), "not JSON"),
    "not UTF-8": (raw_file(b'{"\xff": 1}'), "not UTF-8"),
    "nested too deeply": (raw_file(b'{"a":' * 100_000), "header"),
    "a number of a million digits": (raw_file(b'{"a":' + b"1" * 1_000_000 + b"}"), "header"),
    "a name twice": (
        raw_file(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},' * 1 + b'"a":1}'),
        "'a' occurs twice",
    ),
    "a key twice": (raw_file(b'{"a":{"dtype":"U8","dtype":"I8","shape":[0],"data_offsets":[0,0]}}'), "'dtype' occurs"),
    "no dtype": (raw_file({"w": {"shape": [1], "data_offsets": [0, 1]}}, 1), "'w': header entry"),
    "an extra key": (raw_file({"w": {**entry(), "stride": 1}}, 12), "'w': header entry"),
    "an entry that is a list": (raw_file({"w": [1]}), "'w': header entry"),
    "an empty name": (raw_file({"": entry()}, 12), "printable"),
    "a name with a line break": (raw_file({"w\n": entry()}, 12), "printable"),
    "a lone surrogate": (raw_file(rb'{"\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'), "printable"),
    "four-bit floats": (raw_file({"w": entry("F4", (6, 4))}, 12), "'w': element type 'F4' is not supported"),
    "six-bit floats": (raw_file({"w": entry("F6_E2M3", (4, 4))}, 12), "'F6_E2M3' is not supported"),
    "a type that is no string": (raw_file({"w": entry(7)}, 12), "element type 7"),
    "a negative size": (raw_file({"w": entry(shape=(-2, -3))}, 12), "'w': shape"),
    "a fractional size": (raw_file({"w": entry(shape=(2.0, 3))}, 12), "'w': shape"),
    "a true size": (raw_file({"w": entry(shape=(True, 6))}, 12), "'w': shape"),
    "a shape that overflows": (raw_file({"w": entry(shape=(2**62, 2**62))}, 12), "'w': BF16 of shape"),
    "a shape that wraps round to its size": (raw_file({"w": entry(shape=(2**32, 2**32, 6))}, 12), "'w': BF16"),
    "offsets of three": (raw_file({"w": entry(offsets=(0, 6, 12))}, 12), "'w': data_offsets"),
    "negative offsets": (raw_file({"w": entry(offsets=(-12, 0))}, 12), "'w': data_offsets"),
    "offsets the wrong way round": (raw_file({"w": entry(offsets=(12, 0))}, 12), "'w': BF16 of shape"),
    "more bytes than the shape": (raw_file({"w": entry(offsets=(0, 24))}, 24), "takes 12 bytes"),
    "a hole at the start": (raw_file({"w": entry(offsets=(2, 14))}, 14), "2 bytes before 'w'"),
    "a hole": (raw_file({"v": entry(), "w": entry(offsets=(14, 26))}, 26), "2 bytes before 'w'"),
    "an overlap": (raw_file({"v": entry(), "w": entry(offsets=(10, 22))}, 22), "'w' begins at byte"),
    "twice the same bytes": (raw_file({"v": entry(), "w": entry()}, 12), "inside 'v'"),
    "truncated": (raw_file({"v": entry(), "w": entry(offsets=(12, 24))}, 23), "truncated inside 'w'"),
    "bytes after the end": (raw_file({"v": entry()}, 13), "1 bytes after the last tensor"),
    "metadata of numbers": (raw_file({"__metadata__": {"a": 1}}), "__metadata__ should map strings"),
    "metadata that is a list": (raw_file({"__metadata__": []}), "__metadata__ should map strings"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damage_is_named(damage: str) -> None:
    raw, expected = DAMAGED[damage]
    with pytest.raises(SourceError) as caught:
        parse(raw)
    assert str(caught.value).startswith("file: ")
    assert expected in str(caught.value)
    assert len(str(caught.value)) < 600


@given(st.binary(max_size=200), st.data())
def test_no_bytes_raise_anything_else(noise: bytes, data: st.DataObject) -> None:
    good = raw_file({"w": entry(), "v": entry(offsets=(12, 24))}, 24)
    at = data.draw(st.integers(0, len(good)))
    for raw in (noise, good[:at] + noise + good[at + len(noise) :], good[:at]):
        try:
            header = parse(raw)
        except SourceError:
            continue
        assert sum(info.nbytes for info in header.tensors) == len(raw) - header.data_begin


@pytest.mark.parametrize(
    ("first", "second"), [((0, 4), (6, 10)), ((0, 4), (2, 6)), ((0, 3), (3, 7))], ids=["hole", "overlap", "too short"]
)
def test_a_wrong_plan_is_refused(first: tuple[int, int], second: tuple[int, int]) -> None:
    infos = [
        TensorInfo(name=name, dtype=DType.BF16, shape=(2,), shard="a", begin=begin, end=end)
        for name, (begin, end) in (("a", first), ("b", second))
    ]
    with pytest.raises(PlanError, match=r"a: '[ab]' should be planned once"):
        serialize_header(infos, {})


def test_a_file_of_the_reference_implementation_parses_from_disk(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"w": torch.ones(3, 5)}, file, {"format": "pt"})
    assert parse(file.read_bytes()).metadata == {"format": "pt"}
