"""Whatever is changed in an output is found and named; with the source, what was made wrongly too."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from qconvert import verify as verify_module
from qconvert import verify_source
from qconvert.convert import convert
from qconvert.core.errors import PlanError, QconvertError, SourceError
from qconvert.core.scheme import int4
from qconvert.io import file_record
from qconvert.io.file_record import record_file
from qconvert.io.hashing import ALGORITHMS
from qconvert.plan.policy import Rule, default_policy, scheme_named
from qconvert.verify import Verification, verify
from tests.checkpoints import make_tiny
from tests.cli.test_commands import run
from tests.edits import edit_tensors
from tests.manifests import edit_manifest
from tests.test_convert import POLICIES

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "src"
    make_tiny(folder, layers=2, experts=3, mtp=False)
    (folder / "tokenizer.json").write_text('{"model": {}}')
    return folder


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "out"
    convert(source, out, default_policy(int4(32)), shard_bytes=200_000)
    assert len(list(out.glob("*.safetensors"))) == 4
    return out


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "out")
    return tmp_path / "out"


def named(found: Verification) -> set[tuple[str, str | None]]:
    return {(fault.file, fault.tensor) for fault in found.faults}


def places(folder: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """Where each tensor lies in each file."""
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for file in folder.glob("*.safetensors"):
        raw = file.read_bytes()
        begin = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:begin])
        header.pop("__metadata__")
        found[file.name] = {
            name: (begin + entry["data_offsets"][0], begin + entry["data_offsets"][1]) for name, entry in header.items()
        }
    return found


def flip(file: Path, position: int, bit: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(position)
        byte = opened.read(1)[0]
        opened.seek(position)
        opened.write(bytes([byte ^ 1 << bit]))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", POLICIES)
def test_what_was_converted_has_no_fault(tmp_path: Path, name: str, algorithm: str) -> None:
    policy, group = POLICIES[name]
    make_tiny(tmp_path / "src", group=group, layers=2, experts=2, mtp=False, vision=False)
    convert(tmp_path / "src", tmp_path / "out", policy, algorithm=algorithm)
    found = verify(tmp_path / "out", tmp_path / "src", jobs=3)
    assert found.faults == found.notes == ()
    assert found.tensors == len(json.loads((tmp_path / "out" / "manifest.json").read_text())["tensors"])


def test_rules_for_some_layers_are_repeated_as_they_were(source: Path, tmp_path: Path) -> None:
    rules = (
        Rule(match="text.shared_expert.*", scheme=scheme_named("int8"), reason="last", layers=frozenset({1, 5, 6})),
        Rule(match="text.expert.*", scheme=None, reason="first", layers=frozenset({0})),
    )
    convert(source, tmp_path / "out", default_policy(int4(32, symmetric=False), search=True, rules=rules))
    assert verify(tmp_path / "out", source).faults == ()


@settings(max_examples=150)
@given(data=st.data())
def test_any_flipped_byte_is_found_and_named(made: Path, data: st.DataObject) -> None:
    file = made / data.draw(st.sampled_from(sorted(os.listdir(made))))
    header = data.draw(st.booleans()) and file.suffix == ".safetensors"
    size = 8 + int.from_bytes(file.read_bytes()[:8], "little") if header else file.stat().st_size
    position, bit = data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, 7))
    inside = {name for name, (a, b) in places(made).get(file.name, {}).items() if a <= position < b}
    flip(file, position, bit)
    try:
        if file.name == "manifest.json":
            with pytest.raises(SourceError, match=r"manifest\.json"):
                verify(made)
            return
        found = verify(made)
    finally:
        flip(file, position, bit)
    assert found.faults
    assert inside <= {fault.tensor for fault in found.faults}
    assert any(fault.file == file.name for fault in found.faults)


def drop(folder: Path) -> set[tuple[str, str | None]]:
    name = next(iter(places(folder)["model-00002-of-00004.safetensors"]))
    edit_tensors(folder, lambda tensors: tensors.pop(name))
    return {(INDEX, None), ("model-00002-of-00004.safetensors", None), ("manifest.json", name)}


def add(folder: Path) -> set[tuple[str, str | None]]:
    edit_tensors(folder, lambda tensors: tensors.update(extra=torch.zeros(3)))
    file = next(file for file, tensors in places(folder).items() if "extra" in tensors)
    return {(INDEX, None), (file, None), (file, "extra")}


def exchange(folder: Path) -> set[tuple[str, str | None]]:
    a, b = (folder / f"model-0000{i}-of-00004.safetensors" for i in (1, 2))
    a.rename(folder / "a")
    b.rename(a)
    (folder / "a").rename(b)
    moved = {(INDEX, name) for file in (a, b) for name in places(folder)[file.name]}
    return {(a.name, None), (b.name, None)} | moved


def lose(folder: Path) -> set[tuple[str, str | None]]:
    file = folder / "model-00003-of-00004.safetensors"
    gone = {(file.name, name) for name in places(folder)[file.name]}
    file.unlink()
    return {(file.name, None)} | gone


def truncate(folder: Path) -> set[tuple[str, str | None]]:
    file = folder / "model-00003-of-00004.safetensors"
    gone = {(file.name, name) for name in places(folder)[file.name]}
    os.truncate(file, file.stat().st_size - 1)
    return {(file.name, None)} | gone


def edit_config(folder: Path) -> set[tuple[str, str | None]]:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 1e-5
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    return {("config.json", None)}


def empty_folder(folder: Path) -> set[tuple[str, str | None]]:
    (folder / "onnx").mkdir()
    return {("onnx", None)}


def folder_for_file(folder: Path) -> set[tuple[str, str | None]]:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").mkdir()
    return {("tokenizer.json", None)}


def lying_index(folder: Path) -> set[tuple[str, str | None]]:
    index = json.loads((folder / INDEX).read_text())
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = "model-00009-of-00004.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    record = record_file(folder / INDEX, "xxh3_128").line()
    edit_manifest(folder, lambda document: document["files"].update({INDEX: record}))
    return {(INDEX, name)}


def shapeless_index(folder: Path) -> set[tuple[str, str | None]]:
    (folder / INDEX).write_text('{"weight_map": [[]]}')
    return {(INDEX, None)} | {(INDEX, name) for tensors in places(folder).values() for name in tensors}


CHANGES: tuple[Callable[[Path], set[tuple[str, str | None]]], ...] = (
    drop, add, exchange, lose, truncate, edit_config, empty_folder, folder_for_file, lying_index, shapeless_index,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_named_and_nothing_else_is(
    out: Path, change: Callable[[Path], set[tuple[str, str | None]]]
) -> None:
    expected = change(out)
    before = len(os.listdir("/proc/self/fd"))
    found = named(verify(out))
    # The safetensors package orders tensors otherwise: files that it wrote have other headers too.
    rewritten = {(file.name, None) for file in out.glob("*.safetensors")} if change in (drop, add) else set()
    assert expected <= found <= expected | rewritten
    assert len(os.listdir("/proc/self/fd")) == before


def test_all_faults_are_found_at_once(out: Path) -> None:
    expected = edit_config(out) | empty_folder(out) | truncate(out)
    name, (begin, _) = next(iter(places(out)["model-00001-of-00004.safetensors"].items()))
    flip(out / "model-00001-of-00004.safetensors", begin, 3)
    assert named(verify(out)) == expected | {("model-00001-of-00004.safetensors", name)}


def test_reading_is_piece_by_piece(made: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_record, "_READ_BYTES", 1 << 10)
    largest, real = 0, os.preadv

    def watched(fd: int, buffers: list[memoryview], *rest: int) -> int:
        nonlocal largest
        largest = max(largest, *(len(buffer) for buffer in buffers))
        return real(fd, buffers, *rest)

    monkeypatch.setattr(os, "preadv", watched)
    seen: list[tuple[str, int, int]] = []
    assert verify(made, progress=lambda *step: seen.append(step)).faults == ()
    assert largest == 1 << 10
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert seen[-1][1] == seen[-1][2] == sum(f.stat().st_size for f in made.iterdir() if f.name != "manifest.json")


def change_source(folder: Path) -> str:
    file = sorted(folder.glob("*.safetensors"))[0]
    name, (begin, _) = next((n, p) for n, p in places(folder)[file.name].items() if n.endswith("gate_up_proj"))
    flip(file, begin + 1, 0)
    return name


def test_a_source_that_changed_is_named(made: Path, source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "src")
    name = change_source(tmp_path / "src")
    (tmp_path / "src" / "tokenizer.json").write_text("{}")
    found = verify(made, tmp_path / "src")
    assert {fault.tensor for fault in found.faults} == {name, None}
    assert {Path(fault.file).name for fault in found.faults if fault.tensor is None} == {"tokenizer.json"}
    assert all("the source has changed" in str(fault) for fault in found.faults if fault.tensor)


@pytest.mark.parametrize("wrong", ["source", "memory"])
def test_what_cannot_be_repeated_is_said_before_anything_is_read(
    made: Path, source: Path, tmp_path: Path, wrong: str
) -> None:
    seen: list[str] = []
    with pytest.raises(SourceError if wrong == "source" else PlanError, match=r"no such folder|raise --max-memory"):
        verify(
            made,
            tmp_path / "nowhere" if wrong == "source" else source,
            max_memory=1 if wrong == "memory" else None,
            progress=lambda phase, done, total: seen.append(phase),
        )
    assert seen == []


def forge(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Another tensor of the same type and shape, with hash and seal."""
    file = next(file for file, tensors in places(folder).items() if name in tensors)
    begin, end = places(folder)[file][name]
    data = change(load_file(folder / file)[name]).contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    assert len(data) == end - begin
    with (folder / file).open("r+b") as opened:
        opened.seek(begin)
        opened.write(data)
    digest = file_record.new_hash("xxh3_128")
    digest.update(memoryview(data))
    edit_manifest(folder, lambda document: document["tensors"][name].update(hash=digest.hexdigest()))


@pytest.mark.parametrize(
    "suffix", ["experts.1.up_proj.weight_packed", "layers.0.mlp.gate.weight", "embed_tokens.weight"]
)
def test_forged_numbers_are_found_with_the_source_only(out: Path, source: Path, suffix: str) -> None:
    name = next(name for tensors in places(out).values() for name in tensors if name.endswith(suffix))
    forge(out, name, lambda tensor: tensor.flip(0))
    assert verify(out).faults == ()
    found = verify(out, source)
    assert [fault.tensor for fault in found.faults] == [name]


def other_scheme(document: dict[str, Any]) -> None:
    for rule in document["policy"]:
        if rule.get("scheme") == "int4":
            rule["search"] = True


def with_hash(change: Callable[[dict[str, Any]], object], policy: Any) -> Callable[[dict[str, Any]], object]:
    return lambda document: (change(document), document.update(policy_hash=policy.hash))


TAMPERED: dict[str, Callable[[dict[str, Any]], object]] = {
    "rounded otherwise than it says": with_hash(other_scheme, default_policy(int4(32), search=True)),
    "the hash of another policy": lambda d: d.update(policy_hash="0" * 32),
    "another scheme": with_hash(
        lambda d: d.update(policy=default_policy(int4(64)).entries()), default_policy(int4(64))
    ),
    "a kept tensor more": lambda d: d["decisions"][0].update(tensors=2),
    "an invented reason": lambda d: d["decisions"][0].update(reason="none"),
    "another signal": lambda d: d["sqnr_db"].update({"text.expert.up": 99.0}),
    "another config": lambda d: d.update(config_hash="0" * 32),
    "another source": lambda d: next(iter(d["tensors"].values())).update(source_hash="0" * 32),
    "other rows": lambda d: next(iter(d["tensors"].values())).update(rows=[0, 1]),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_a_manifest_that_tells_of_another_conversion_is_found_with_the_source(
    out: Path, source: Path, what: str
) -> None:
    edit_manifest(out, TAMPERED[what])
    assert verify(out).faults == ()
    try:
        assert verify(out, source).faults
    except QconvertError as error:
        assert what == "another scheme", error  # this source does not fit it


def test_an_output_of_another_scheme_has_faults_in_every_expert(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", default_policy(int4(32), search=True))
    edit_manifest(tmp_path / "out", with_hash(
        lambda d: d.update(policy=default_policy(int4(32)).entries()), default_policy(int4(32))
    ))  # fmt: skip
    assert verify(tmp_path / "out").faults == ()
    wrong = {fault.tensor for fault in verify(tmp_path / "out", source).faults if fault.tensor}
    experts = {name for name in load_file(tmp_path / "out" / "model.safetensors") if "experts" in name}
    assert {name for name in wrong if name.endswith("_packed")} == {n for n in experts if n.endswith("_packed")}
    assert wrong <= experts


def test_another_version_is_noted(made: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_source, "__version__", "9.9")
    assert "9.9" in verify(made, source).notes[0]
    assert verify(made).notes == ()
    assert verify_module.verify is verify


@pytest.mark.parametrize("where", ["nothing", "a file", "a folder without a manifest"])
def test_what_is_no_output_is_one_error(tmp_path: Path, where: str) -> None:
    folder = tmp_path / "out"
    if where == "a file":
        folder.write_text("")
    elif where != "nothing":
        make_tiny(folder, layers=1)
    with pytest.raises(SourceError, match="out"):
        verify(folder)


def test_the_command_names_all_faults_and_ends_with_a_code_of_their_own(out: Path, source: Path) -> None:
    good = run("verify", out, "--deep", source, "--json")
    assert good.exit_code == 0
    assert json.loads(good.stdout)["faults"] == []
    expected = truncate(out) | edit_config(out)
    bad = run("verify", out)
    assert bad.exit_code == 1
    for file, tensor in expected:
        assert file in bad.stdout and (tensor is None or tensor in bad.stdout)
    document = json.loads(run("verify", out, "--json").stdout)
    assert {(fault["file"], fault["tensor"]) for fault in document["faults"]} == expected
    (out / "manifest.json").unlink()
    none = run("verify", out)
    assert none.exit_code == 3
    assert "no manifest.json" in none.stderr and "Traceback" not in none.output
