"""Checkpoints that somebody has damaged on purpose: every file of one, changed in every way that a list can hold."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"

Damage = Callable[[Path], object]
# mypy finds no type for a lambda whose default binds what a loop moves on: hence the ignores below.


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 1.0, 1.5, 1e30, -1e300, float("nan"), float("inf"), 2**31, 2**63, 10**30, 10**400,
    "", "1", "BF16", "F4", "\0", [], {}, [[]], [None], [-1], [1.5], [0], ["1"], [True, True], [2**62, 4],
    [2**32, 2**32], [0, 2**63], [1, 0], [1] * 1000, nested(200), {"a": {"b": []}}, "x" * 100_000,
)  # fmt: skip
"""What a JSON field may hold instead."""

LENGTHS = (0, 1, 2, 7, 100, 99_999_999, 100_000_000, 100_000_001, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1)

TEXTS: tuple[bytes, ...] = (
    b"", b" ", b"{", b"{}", b"[]", b"null", b"0", b'"x"', b"{}{}", b"{} x", b" {}", b"\xef\xbb\xbf{}",
    b"\xff\xfe{\0}\0",
    b'{"a": NaN}', b'{"a": Infinity}', b'{"a": 1e999}', b'{"a": ' + b"9" * 5000 + b"}", b'{"\xff": 1}',
    b'{"\\ud800": 1}',
    b"[" * 100_000, b'{"a":' * 100_000, b'{"a":' * 900 + b"1" + b"}" * 900, b'{"a": 1, "a": 1}', b"\0" * 64,
    b"{" + b" " * 1000,
    b'{"__metadata__": {"format": "pt"}}', b"{'a': 1}", b'{"a": 01}', b'{"a": "\n"}',
)  # fmt: skip

PATHS: tuple[str, ...] = (
    "", ".", "..", "../x.safetensors", "../outside.safetensors", "/etc/passwd", "/x.safetensors", "a/b.safetensors",
    "c:x.safetensors", "..\\x.safetensors", "x\0.safetensors", "x\n.safetensors", "config.json", "absent.safetensors",
    ".safetensors", INDEX, "x.bin", "~/x.safetensors", "y" * 5000 + ".safetensors", "\ud800.safetensors", FIRST, SECOND,
)  # fmt: skip


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    header: dict[str, Any] = json.loads(raw[8:begin])
    return header, raw[begin:]


def put_header(path: Path, text: bytes, data: bytes, length: int | None = None) -> None:
    length = len(text) if length is None else length
    path.write_bytes(length.to_bytes(8, "little") + text + data)


def edited(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Change the header's JSON."""

    def damage(folder: Path) -> None:
        header, data = header_of(folder / WEIGHTS)
        change(header)
        put_header(folder / WEIGHTS, json.dumps(header).encode(), data)

    return damage


def first(header: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = next(entry for name, entry in header.items() if name != "__metadata__")
    return entry


def headers() -> Iterator[tuple[str, Damage]]:
    """Damage to the header of a single file with weights."""
    for length in LENGTHS:
        yield f"a length of {length}", lambda f, n=length: put_header(f / WEIGHTS, b"{}", b"", n)  # type: ignore[misc]
        yield (
            f"a length of {length} before much",
            lambda f, n=length: put_header(  # type: ignore[misc]
                f / WEIGHTS, *_parts(f), n
            ),
        )
    for i, text in enumerate(TEXTS):
        yield f"text {i}", lambda f, t=text: put_header(f / WEIGHTS, t, b"")  # type: ignore[misc]
        yield f"text {i} and data", lambda f, t=text: put_header(f / WEIGHTS, t, b"\0" * 64)  # type: ignore[misc]
    for size in (0, 1, 7, 8, 9, 500, -1, -1000):
        yield (
            f"cut at {size}",
            lambda f, n=size: os.truncate(  # type: ignore[misc]
                f / WEIGHTS, n if n >= 0 else (f / WEIGHTS).stat().st_size + n
            ),
        )
    for i, value in enumerate(VALUES):
        for field in ("dtype", "shape", "data_offsets"):
            yield f"{field}: value {i}", edited(lambda h, k=field, v=value: first(h).update({k: v}))  # type: ignore[misc]
        yield f"entry: value {i}", edited(lambda h, v=value: h.update({next(iter(h)): v}))  # type: ignore[misc]
        yield f"metadata: value {i}", edited(lambda h, v=value: h.update(__metadata__=v))  # type: ignore[misc]
        yield f"in metadata: value {i}", edited(lambda h, v=value: h.update(__metadata__={"a": v}))  # type: ignore[misc]
    for name in ("", "\0", "a\nb", "../x", "x" * 100_000, "\ud800", "model.layers.9.", "lm_head.weight.weight", *NAMES):
        yield f"name {name[:60]!r}", edited(lambda h, n=name: h.update({n: h.pop("lm_head.weight")}))  # type: ignore[misc]
    for by in (-1, 1, -2, 2, 64, -64, 2**40):
        yield f"all moved by {by}", edited(lambda h, n=by: _move(h, n, all_of_them=True))  # type: ignore[misc]
        yield f"one moved by {by}", edited(lambda h, n=by: _move(h, n, all_of_them=False))  # type: ignore[misc]
    yield "a field more", edited(lambda h: first(h).update(more=1))
    yield "a field less", edited(lambda h: first(h).pop("dtype"))
    yield (
        "ten thousand empty tensors",
        edited(
            lambda h: h.update({f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(10_000)})
        ),
    )


NAMES = (
    "model.language_model.layers.99999999999.input_layernorm.weight",
    "model.language_model.layers." + "9" * 5000 + ".input_layernorm.weight",
    "model.language_model.layers.-1.input_layernorm.weight",
    "model.language_model.layers.0.mlp.experts.99999999999.up_proj.weight",
    "model.language_model.layers.٣.input_layernorm.weight",
    "mtp.layers.99999999999.input_layernorm.weight",
    "mtp.layers.9999999.input_layernorm.weight",
    "model.language_model.layers.9999999.mlp.experts.9999999.up_proj.weight",
    "model.visual.blocks.99999999999.norm1.weight",
    "model.language_model.layers.1.self_attn.q_proj.qweight",
    "model.language_model.layers.0.mlp.experts.0.up_proj.weight_packed",
)  # fmt: skip


def _parts(folder: Path) -> tuple[bytes, bytes]:
    header, data = header_of(folder / WEIGHTS)
    return json.dumps(header).encode(), data


def _move(header: dict[str, Any], by: int, *, all_of_them: bool) -> None:
    for name in list(header)[3 : None if all_of_them else 4]:
        header[name]["data_offsets"] = [n + by for n in header[name]["data_offsets"]]


def indexed(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Change the index's JSON."""

    def damage(folder: Path) -> None:
        document = json.loads((folder / INDEX).read_text())
        change(document)
        (folder / INDEX).write_text(json.dumps(document))

    return damage


def indexes() -> Iterator[tuple[str, Damage]]:
    """Damage to the index of two files with weights, and to which files there are."""
    for i, text in enumerate(TEXTS):
        yield f"text {i}", lambda f, t=text: (f / INDEX).write_bytes(t)  # type: ignore[misc]
    for i, value in enumerate(VALUES):
        yield f"map: value {i}", indexed(lambda d, v=value: d.update(weight_map=v))  # type: ignore[misc]
        yield f"a file: value {i}", indexed(lambda d, v=value: d["weight_map"].update({"lm_head.weight": v}))  # type: ignore[misc]
    for path in PATHS:
        yield f"one in {path[:30]!r}", indexed(lambda d, p=path: d["weight_map"].update({"lm_head.weight": p}))  # type: ignore[misc]
        yield (
            f"all in {path[:30]!r}",
            indexed(  # type: ignore[misc]
                lambda d, p=path: d.update(weight_map=dict.fromkeys(d["weight_map"], p))
            ),
        )
    yield "a tensor in both", lambda f: (f / SECOND).write_bytes((f / FIRST).read_bytes())
    yield "a shard is missing", lambda f: (f / SECOND).unlink()
    yield "a link out of the folder", lambda f: ((f / SECOND).unlink(), (f / SECOND).symlink_to("/etc/passwd"))
    yield "a link to zeros", lambda f: ((f / SECOND).unlink(), (f / SECOND).symlink_to("/dev/zero"))
    yield "a link around", lambda f: ((f / SECOND).unlink(), (f / SECOND).symlink_to(SECOND))
    yield "an endless hole", lambda f: os.truncate(f / SECOND, 1 << 42)
    yield "an endless hole alone", lambda f: (os.truncate(f / SECOND, 0), os.truncate(f / SECOND, 1 << 42))
    yield "an index with an endless hole", lambda f: os.truncate(f / INDEX, 1 << 42)
    yield "a config with an endless hole", lambda f: os.truncate(f / "config.json", 1 << 42)


def configured(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Change ``config.json``."""

    def damage(folder: Path) -> None:
        document = json.loads((folder / "config.json").read_text())
        change(document)
        (folder / "config.json").write_text(json.dumps(document))

    return damage


def configs(config: dict[str, Any]) -> Iterator[tuple[str, Damage]]:
    """Damage to ``config.json``: texts, then every field with values in turn and huge numbers where counts stand."""
    for i, text in enumerate(TEXTS):
        yield f"text {i}", lambda f, t=text: (f / "config.json").write_bytes(t)  # type: ignore[misc]
    values = cycle(enumerate(VALUES))
    for at in fields(config):
        for _ in range(2):  # every field meets others
            i, value = next(values)
            yield f"{'.'.join(at)}: value {i}", configured(lambda c, k=at, v=value: put(c, k, v))  # type: ignore[misc]
        yield f"{'.'.join(at)}: gone", configured(lambda c, k=at: parent(c, k).pop(k[-1]))  # type: ignore[misc]
        if type(parent(config, at)[at[-1]]) in (int, float):
            for huge in (10**5, 10**9, 10**400):
                yield (
                    f"{'.'.join(at)}: {huge:.0e}" if huge < 10**300 else f"{'.'.join(at)}: beyond floats",
                    configured(
                        lambda c, k=at, v=huge: put(c, k, v)  # type: ignore[misc]
                    ),
                )
    for count in (10**5, 10**9):
        yield (
            f"{count} layers of any type",
            configured(
                lambda c, n=count: (c["text_config"].pop("layer_types"), c["text_config"].update(num_hidden_layers=n))  # type: ignore[misc]
            ),
        )
    yield (
        "a million types",
        configured(
            lambda c: c["text_config"].update(num_hidden_layers=10**6, layer_types=["linear_attention"] * 10**6)
        ),
    )
    for i, value in enumerate(VALUES):
        yield f"quantization_config: value {i}", configured(lambda c, v=value: c.update(quantization_config=v))  # type: ignore[misc]
        yield f"rope_scaling: value {i}", configured(lambda c, v=value: c.update(rope_scaling=v))  # type: ignore[misc]


def fields(block: dict[str, Any], at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in block.items():
        yield (*at, key)
        if isinstance(value, dict):
            yield from fields(value, (*at, key))


def parent(config: dict[str, Any], at: tuple[str, ...]) -> dict[str, Any]:
    for key in at[:-1]:
        config = config[key]
    return config


def put(config: dict[str, Any], at: tuple[str, ...], value: Any) -> None:
    parent(config, at)[at[-1]] = copy.deepcopy(value)
