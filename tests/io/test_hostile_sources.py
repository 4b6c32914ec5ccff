"""No checkpoint, whoever made it, does more than an error: no crash, no memory without reason, no file elsewhere."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import resource
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st

from qconvert.cli import inspect as inspect_module
from qconvert.cli.inspect import inspect
from qconvert.convert import convert
from qconvert.core.errors import QconvertError, SourceError
from qconvert.core.scheme import int4
from qconvert.parity.run import ParityOptions, compare
from qconvert.plan.policy import default_policy
from reference_model.config_fields import ConfigError
from tests.checkpoints import make_tiny, tiny_config
from tests.io.hostile import WEIGHTS, Damage, configs, fields, headers, indexes, put, put_header

POLICY = default_policy(int4(32))
ADDRESS_SPACE = 384 << 20
"""More than a tiny conversion takes with its threads; a billion of anything is more."""

CONFIG = tiny_config(layers=2, experts=2)
CORPUS: dict[str, tuple[int, list[tuple[str, Damage]]]] = {
    "headers": (1, list(headers())),
    "indexes": (2, list(indexes())),
    "configs": (1, list(configs(CONFIG))),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Good checkpoints by the number of their files with weights, and a conversion of one."""
    folder = tmp_path_factory.mktemp("sources")
    for shards in (1, 2):
        make_tiny(folder / str(shards), shards=shards, layers=2, experts=2)
    convert(folder / "1", folder / "0", POLICY)
    assert compare(folder / "1", folder / "0", ParityOptions(run_model=False)).causes == ()
    return {int(path.name): path for path in folder.iterdir()}


@pytest.fixture(scope="module", autouse=True)
def two_sizes() -> Iterator[None]:
    """`inspect` plans for ten schemes, each time on the same way: two are enough to see what it does to a planner."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspect_module, "_OFFERED", (("int4", 32), ("fp8-block", None)))
        yield


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Little more memory than there is now, and a quarter of a minute."""

    def late(number: int, frame: object) -> None:
        raise AssertionError("it takes too long")

    with open("/proc/self/statm") as file:  # noqa: PTH123
        now = int(file.read().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (now + ADDRESS_SPACE, limits[1]))
    signal.alarm(15)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, before)


def survive(folder: Path, good: Path | None, converted: Path) -> None:
    """Every command on ``folder``, as what became of ``good`` too, succeeds or ends with an error of ours.

    Nothing appears elsewhere.
    """
    around = folder.parent
    before, inside = sorted(os.listdir(around)), sorted(os.listdir(folder))
    out = around / "out"
    with bounded():
        with pytest.raises(typer.Exit) as ended:
            inspect(str(folder), json=True)
        assert ended.value.exit_code in (0, 3)
        with contextlib.suppress(QconvertError):
            convert(folder, out, POLICY)
        for pair in [(folder, converted)] + ([] if good is None else [(good, folder)]):
            with contextlib.suppress(QconvertError, ConfigError):
                compare(*pair, ParityOptions(run_model=False))
    if out.exists():
        assert not any(path.is_symlink() for path in out.iterdir())
        shutil.rmtree(out)
    assert sorted(os.listdir(around)) == before
    assert sorted(os.listdir(folder)) == inside


@pytest.mark.parametrize("kind", CORPUS)
def test_the_corpus_does_no_harm(sources: dict[int, Path], tmp_path: Path, kind: str) -> None:
    shards, corpus = CORPUS[kind]
    assert len(corpus) > 100
    folder, failed = tmp_path / "hostile", []
    (tmp_path / "outside.safetensors").write_bytes((sources[1] / WEIGHTS).read_bytes())
    for name, damage in corpus:
        shutil.copytree(sources[shards], folder)
        damage(folder)
        try:
            survive(folder, sources[1] if name.startswith(("text ", "quantization")) else None, sources[0])
        except Exception as error:  # noqa: BLE001 - all are tried before any is reported
            failed.append(f"{name}: {type(error).__name__}: {str(error)[-300:]}")
        shutil.rmtree(folder)
    assert not failed, "\n".join(failed)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
SIZES = st.integers(-2, 70) | st.sampled_from([2**31, 2**62, 2**63, 2**64])
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["BF16", "F32", "U8", "I64", "F8_E4M3", "X"]) | JSON,
        "shape": st.lists(SIZES, max_size=4) | JSON,
        "data_offsets": st.lists(SIZES, min_size=2, max_size=2) | JSON,
    }
)


def only(folder: Path) -> Path:
    """A folder with a good configuration and nothing else."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@settings(max_examples=60)
@given(
    header=st.dictionaries(st.text(max_size=8) | st.just("lm_head.weight"), ENTRY | JSON, max_size=4) | JSON,
    data=st.binary(max_size=80),
    length=st.none() | st.integers(0, 2**64 - 1),
)
def test_no_header_does_harm(
    sources: dict[int, Path], tmp_path_factory: pytest.TempPathFactory, header: Any, data: bytes, length: int | None
) -> None:
    folder = only(tmp_path_factory.getbasetemp() / "fuzz" / "header")
    put_header(folder / WEIGHTS, json.dumps(header).encode(), data, length)
    survive(folder, sources[1], sources[0])


@settings(max_examples=60)
@given(data=st.data())
def test_no_change_of_a_byte_does_harm(
    sources: dict[int, Path], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzz" / "bytes"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sources[2], folder)
    file = folder / data.draw(st.sampled_from(sorted(os.listdir(folder))))
    raw = bytearray(file.read_bytes())
    begin = data.draw(st.integers(0, min(len(raw), 3000) - 1))
    raw[begin : begin + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    file.write_bytes(raw)
    survive(folder, sources[1], sources[0])


@settings(max_examples=60)
@given(data=st.data())
def test_no_configuration_does_harm(
    sources: dict[int, Path], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzz" / "config"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sources[1], folder)
    config = copy.deepcopy(CONFIG)
    for at in data.draw(st.lists(st.sampled_from(sorted(fields(CONFIG), key=len)), min_size=1, max_size=3)):
        with contextlib.suppress(KeyError, TypeError):  # an earlier change took its block away
            put(config, at, data.draw(JSON | SIZES))
    (folder / "config.json").write_text(json.dumps(config))
    survive(folder, sources[1], sources[0])


@pytest.mark.parametrize("left", [0, 7, 8, 100, 5000, 60_000])
@pytest.mark.parametrize("when", ["after its size was asked for", "while tensors are read"])
def test_a_file_that_shrinks_while_it_is_read_is_one_error(
    sources: dict[int, Path], tmp_path: Path, left: int, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(sources[1], tmp_path / "src")
    file = tmp_path / "src" / WEIGHTS
    name = "pread" if when.startswith("after") else "preadv"
    real = getattr(os, name)

    def shrunk(fd: int, *rest: Any) -> Any:
        if os.path.samestat(os.fstat(fd), file.stat()) and file.stat().st_size > left:
            os.truncate(file, left)
        return real(fd, *rest)

    monkeypatch.setattr(os, name, shrunk)
    with pytest.raises(SourceError, match=r"model\.safetensors") as caught:
        convert(tmp_path / "src", tmp_path / "out", POLICY)
    assert "shrank" in str(caught.value) or "no safetensors file" in str(caught.value)
    assert not (tmp_path / "out").exists()
