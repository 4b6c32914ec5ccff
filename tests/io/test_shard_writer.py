"""What is written appears whole, as planned and as others read it, or nothing appears at all."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen3_5MoeForCausalLM

from qconvert.core.dtypes import DType
from qconvert.core.errors import OutputError, PlanError, QconvertError, SourceError
from qconvert.core.plan import Layout
from qconvert.core.tensor_info import TensorInfo
from qconvert.io.checkpoint import Checkpoint
from qconvert.io.output_file import OutputFile
from qconvert.io.piece import Bytes
from qconvert.io.safetensors_header import serialize_header
from qconvert.io.shard_writer import PYTORCH_METADATA, ShardWriter
from qconvert.io.sink import Sink
from tests.checkpoints import make_tiny

TENSORS = {
    "a.weight": torch.arange(35.0).view(5, 7),
    "b.weight": torch.arange(66.0).view(3, 2, 11).to(torch.bfloat16),
    "c": torch.tensor(3, dtype=torch.int64),
    "d.weight_packed": torch.arange(12, dtype=torch.int32).view(4, 3),
    "e.codes": torch.arange(9, dtype=torch.uint8),
    "f.weight": torch.arange(24.0).view(4, 6).to(torch.float8_e4m3fn),
    "g.empty": torch.empty(0, 5),
}


def lay_out(tensors: dict[str, Tensor], shards: int = 2) -> Layout:
    """Tensors dealt to files in turn."""
    infos: list[TensorInfo] = []
    for number in range(shards):
        shard = "model.safetensors" if shards == 1 else f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        mine = [name for i, name in enumerate(tensors) if i % shards == number]
        mine.sort(key=lambda name: -tensors[name].itemsize)
        placed, position = [], 0
        for name in mine:
            tensor = tensors[name]
            end = position + tensor.nbytes
            dtype, shape = DType.from_torch(tensor.dtype), tuple(tensor.shape)
            placed.append(TensorInfo(name=name, dtype=dtype, shape=shape, shard=shard, begin=position, end=end))
            position = end
        header = len(serialize_header(placed, PYTORCH_METADATA))
        infos.extend(replace(info, begin=info.begin + header, end=info.end + header) for info in placed)
    return Layout(tensors=tuple(infos))


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def write(sink: Sink, name: str, *parts: Tensor | Bytes, begin: int = 0, end: int | None = None) -> None:
    """A step of one piece."""
    piece = sink.piece(name, begin, end)
    for part in parts:
        piece.append(part)
    sink.commit(f"{name} {begin}", [piece], {})


def write_all(sink: Sink, tensors: dict[str, Tensor] = TENSORS) -> None:
    for name, tensor in tensors.items():
        write(sink, name, tensor)


def loaded(out: Path) -> dict[str, Tensor]:
    return {name: tensor for shard in out.glob("*.safetensors") for name, tensor in load_file(shard).items()}


def assert_holds(out: Path, tensors: dict[str, Tensor]) -> None:
    found = loaded(out)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert raw(found[name]) == raw(tensor)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "out"


def assert_nothing_left(out: Path) -> None:
    assert list(out.parent.parent.iterdir()) == []


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_others_read_what_was_written(out: Path, shards: int) -> None:
    with ShardWriter(out, lay_out(TENSORS, shards)) as writer:
        write_all(writer)
        assert not out.exists()
        hashes = writer.finish({"config.json": b"{}"})
    assert_holds(out, TENSORS)
    assert hashes == {name: xxhash.xxh3_128_hexdigest(raw(tensor)) for name, tensor in TENSORS.items()}
    assert [file.name for file in out.parent.iterdir()] == ["out"]
    with Checkpoint.open(out) as checkpoint:
        assert set(checkpoint.tensors) == set(TENSORS)
        assert set(checkpoint.left_out) == set()


def test_the_index_names_every_tensor_sorted_with_the_total_size(out: Path) -> None:
    with ShardWriter(out, lay_out(TENSORS)) as writer:
        write_all(writer)
        writer.finish()
    text = (out / "model.safetensors.index.json").read_text()
    index = json.loads(text)
    assert text == json.dumps(index, indent=2) + "\n"
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in TENSORS.values())}
    assert list(index["weight_map"]) == sorted(TENSORS)
    assert all(name in load_file(out / shard) for name, shard in index["weight_map"].items())


def test_a_single_file_needs_no_index(out: Path) -> None:
    with ShardWriter(out, lay_out(TENSORS, 1)) as writer:
        write_all(writer)
        writer.finish({"config.json": b"{}"})
    assert sorted(file.name for file in out.iterdir()) == ["config.json", "model.safetensors"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(seed=st.integers(0, 2**32), piece=st.integers(1, 60))
def test_any_order_any_pieces_any_thread_give_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, seed: int, piece: int
) -> None:
    out = tmp_path_factory.mktemp("any") / "out"
    jobs = [
        (name, offset, data[offset : offset + piece])
        for name, data in ((name, raw(tensor)) for name, tensor in TENSORS.items())
        for offset in range(0, len(data), piece)
    ]
    random.Random(seed).shuffle(jobs)

    def work(job: tuple[str, int, bytes]) -> None:
        name, offset, data = job
        half = len(data) // 2
        write(writer, name, data[:half], data[half:], begin=offset, end=offset + len(data))

    with ShardWriter(out, lay_out(TENSORS)) as writer:
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(work, jobs))
        hashes = writer.finish()
    assert_holds(out, TENSORS)
    assert hashes == {name: xxhash.xxh3_128_hexdigest(raw(tensor)) for name, tensor in TENSORS.items()}


def test_tensors_are_written_in_row_major_order_whatever_their_strides(out: Path) -> None:
    turned = {"w": torch.arange(12.0).view(3, 4).t()}
    with ShardWriter(out, lay_out(turned, 1)) as writer:
        write(writer, "w", turned["w"])
        writer.finish()
    assert load_file(out / "model.safetensors")["w"].equal(turned["w"])


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_buffers_are_taken_as_they_are(out: Path, kind: Callable[[bytes], memoryview]) -> None:
    with ShardWriter(out, lay_out({"a": TENSORS["a.weight"]}, 1)) as writer:
        write(writer, "a", kind(raw(TENSORS["a.weight"])))
        writer.finish()
    assert_holds(out, {"a": TENSORS["a.weight"]})


WRONG: dict[str, tuple[Callable[[ShardWriter], object], str]] = {
    "past the end": (
        lambda w: write(w, "a.weight", torch.zeros(6, 7)),
        r"safetensors: 'a.weight' has 140 bytes left, not 168",
    ),
    "past the end of the tensor": (lambda w: w.piece("a.weight", 4, 144), "4 .. 144 do not fit into 'a.weight'"),
    "before the start": (lambda w: w.piece("a.weight", -4), "do not fit into 'a.weight'"),
    "unknown": (lambda w: w.piece("z"), "'z' is not in the plan's layout"),
    "another type": (lambda w: write(w, "a.weight", torch.zeros(5, 7).half()), "planned as F32, but torch.float16"),
    "a piece too short": (
        lambda w: write(w, "a.weight", bytes(8)),
        "'a.weight' is incomplete, it was written up to byte 8 of 140",
    ),
    "overlapping": (
        lambda w: (write(w, "a.weight", bytes(8), end=8), write(w, "a.weight", bytes(8), begin=4, end=12)),
        r"bytes 4 .. 12 of 'a.weight' overlap 0 .. 8",
    ),
    "nothing at all": (lambda w: w.finish(), "'c' is incomplete, 0 of 8"),
    "all but a row": (
        lambda w: (
            write(w, "a.weight", torch.zeros(4, 7), end=112),
            write_all(w, {k: v for k, v in TENSORS.items() if k != "a.weight"}),
            w.finish(),
        ),
        "'a.weight' is incomplete, 112 of 140",
    ),
    "a gap": (
        lambda w: (
            write(w, "a.weight", bytes(40), end=40),
            write(w, "a.weight", bytes(96), begin=44),
            write_all(w, {k: v for k, v in TENSORS.items() if k != "a.weight"}),
            w.finish(),
        ),
        "'a.weight' is incomplete, 40 of 140",
    ),
    "a file outside": (lambda w: (write_all(w), w.finish({"../x": b""})), "'../x'"),
    "a file twice": (lambda w: (write_all(w), w.finish({"model-00001-of-00002.safetensors": b""})), "name is taken"),
    "an index of one's own": (lambda w: (write_all(w), w.finish({"model.safetensors.index.json": b""})), "is taken"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_write_is_one_error_and_leaves_nothing(out: Path, fault: str) -> None:
    act, expected = WRONG[fault]
    with pytest.raises(OutputError, match=expected), ShardWriter(out, lay_out(TENSORS)) as writer:
        act(writer)
    assert_nothing_left(out)


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, ValueError, SystemExit])
def test_an_exception_of_the_caller_leaves_nothing(out: Path, interruption: type[BaseException]) -> None:
    with pytest.raises(interruption), ShardWriter(out, lay_out(TENSORS)) as writer:
        write_all(writer)
        raise interruption
    assert_nothing_left(out)


def test_leaving_without_finishing_leaves_nothing(out: Path) -> None:
    with ShardWriter(out, lay_out(TENSORS)) as writer:
        write_all(writer)
    assert_nothing_left(out)


def damage_when_durable(monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None]) -> None:
    """Do something to every file as soon as it is synced."""
    sync = OutputFile.sync

    def sync_and_damage(file: OutputFile) -> None:
        sync(file)
        damage(file.path)

    monkeypatch.setattr(OutputFile, "sync", sync_and_damage)


def test_bytes_that_change_on_disk_are_noticed(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = next(info for info in lay_out(TENSORS).tensors if info.name == "b.weight")
    expected = r"of 'b.weight' read back differently"

    def damage(path: Path) -> None:
        if path.name == info.shard:
            with path.open("r+b") as file:
                file.seek(info.end - 1)
                file.write(b"\xff")

    damage_when_durable(monkeypatch, damage)
    with pytest.raises(OutputError, match=expected), ShardWriter(out, lay_out(TENSORS)) as writer:
        write_all(writer)
        writer.finish()
    assert_nothing_left(out)


def test_no_hash_is_told_of_pieces_that_nobody_wrote(out: Path) -> None:
    layout = lay_out({"a": TENSORS["a.weight"]}, 1)
    info, flat = layout.tensors[0], TENSORS["a.weight"].contiguous().view(-1)
    count = len(flat) // 2
    half = count * flat.itemsize
    expected = "of 'a' read back differently"
    with pytest.raises(OutputError, match=expected), ShardWriter(out, layout, read_back=False) as writer:
        write(writer, "a", flat[:count], begin=0, end=half)
        write(writer, "a", flat[count:], begin=half, end=info.nbytes)
        writer.flush()
        with (writer.path / info.shard).open("r+b") as file:
            file.seek(info.end - 1)
            file.write(bytes([raw(flat)[-1] ^ 1]))
        writer.finish()
    assert_nothing_left(out)


def test_a_shard_that_is_cut_short_is_noticed(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damage_when_durable(monkeypatch, lambda path: os.truncate(path, 300))
    expected = "cannot be read back, the file ends at 300"
    with pytest.raises(OutputError, match=expected), ShardWriter(out, lay_out(TENSORS)) as writer:
        write_all(writer)
        writer.finish()
    assert_nothing_left(out)


def test_who_trusts_the_disk_reads_nothing_back(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: OutputFile, *_: object) -> None:
        raise OutputError(f"{file.path} is read")

    monkeypatch.setattr(OutputFile, "read", refuse)
    with pytest.raises(OutputError, match="is read"), ShardWriter(out, lay_out(TENSORS)) as writer:
        write_all(writer)
        writer.finish()
    assert_nothing_left(out)
    with ShardWriter(out, lay_out(TENSORS), read_back=False) as writer:
        write_all(writer)
        writer.finish()
    assert_holds(out, TENSORS)


CALLS = ["ftruncate", "pwrite", "fsync", "preadv", "mkdir"]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_disk_that_refuses_is_one_error_and_leaves_nothing(
    out: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, refuse)
    expected = "cannot write" if number == errno.EIO else "disk full while writing"
    with pytest.raises(OutputError, match=expected), ShardWriter(out, lay_out(TENSORS)) as writer:
        write_all(writer)
        writer.finish({"config.json": b"{}"})
    monkeypatch.undo()
    assert_nothing_left(out)


def test_a_disk_that_fills_up_half_way(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite, room = os.pwrite, [400]

    def limited(fd: int, data: bytes, offset: int) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = pwrite(fd, data[: room[0]], offset)
        room[0] -= count
        return count

    monkeypatch.setattr(os, "pwrite", limited)
    with pytest.raises(OutputError, match="disk full"), ShardWriter(out, lay_out(TENSORS)) as writer:
        write_all(writer)
        writer.finish()
    assert_nothing_left(out)


def test_short_writes_are_continued(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:5], offset))
    with ShardWriter(out, lay_out(TENSORS)) as writer:
        write_all(writer)
        writer.finish()
    assert_holds(out, TENSORS)


def test_too_little_room_is_said_before_anything_is_written(out: Path) -> None:
    size = 1 << 60
    info = TensorInfo(name="w", dtype=DType.U8, shape=(size,), shard="model.safetensors", begin=0, end=size)
    header = len(serialize_header([info], PYTORCH_METADATA))
    layout = Layout(tensors=(replace(info, begin=header, end=size + header),))
    with pytest.raises(OutputError, match=r"disk full: .* needs 1152921504.61 GB"):
        ShardWriter(out, layout)
    assert_nothing_left(out)


def test_a_process_that_is_killed_does_not_block_the_next(out: Path) -> None:
    child = os.fork()
    if not child:
        try:
            writer = ShardWriter(out, lay_out(TENSORS))
            write(writer, "a.weight", TENSORS["a.weight"])
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not out.exists()
    assert out.with_name(".out.partial").exists()
    with ShardWriter(out, lay_out(TENSORS)) as writer:
        write_all(writer)
        writer.finish()
    assert_holds(out, TENSORS)
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_side_files_are_copied_through_their_links(out: Path, tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    blob.write_bytes(os.urandom(100_000))
    link = tmp_path / "tokenizer.json"
    link.symlink_to(blob)
    with ShardWriter(out, lay_out(TENSORS)) as writer:
        write_all(writer)
        writer.finish({"tokenizer.json": link, "config.json": b"{}"})
    assert not (out / "tokenizer.json").is_symlink()
    assert (out / "tokenizer.json").read_bytes() == blob.read_bytes()
    assert (out / "config.json").read_bytes() == b"{}"


def test_a_file_made_from_the_hashes_gets_those_of_the_bytes_on_disk(out: Path) -> None:
    with ShardWriter(out, lay_out(TENSORS)) as writer:
        write_all(writer)
        hashes = writer.finish({"hashes.json": lambda found: [json.dumps(dict(found)).encode()]})
    assert json.loads((out / "hashes.json").read_text()) == hashes


def test_a_side_file_that_vanished_is_the_sources_fault(out: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"vanished\.json"), ShardWriter(out, lay_out(TENSORS)) as writer:
        write_all(writer)
        writer.finish({"tokenizer.json": tmp_path / "vanished.json"})
    assert_nothing_left(out)


def shift(layout: Layout) -> Layout:
    return Layout(tensors=tuple(replace(info, begin=info.begin + 8, end=info.end + 8) for info in layout.tensors))


PLANS: dict[str, Callable[[Layout], Layout]] = {
    "shifted": shift,
    "a name in two files": lambda plan: Layout(tensors=tuple(replace(i, name="same") for i in plan.tensors)),
    "a file outside": lambda plan: Layout(tensors=tuple(replace(i, shard="../x.safetensors") for i in plan.tensors)),
    "a file of another kind": lambda plan: Layout(tensors=tuple(replace(i, shard="x.bin") for i in plan.tensors)),
    "a hole": lambda plan: Layout(tensors=plan.tensors[:1] + plan.tensors[2:]),
}


@pytest.mark.parametrize("fault", PLANS)
def test_an_impossible_plan_is_refused_before_anything_is_written(out: Path, fault: str) -> None:
    with pytest.raises(PlanError):
        ShardWriter(out, PLANS[fault](lay_out(TENSORS, 1)))
    assert not out.parent.exists()


def test_errors_of_ours_have_exit_codes(out: Path) -> None:
    out.mkdir(parents=True)
    with pytest.raises(QconvertError) as caught:
        ShardWriter(out, lay_out(TENSORS))
    assert caught.value.exit_code == OutputError.exit_code


@pytest.mark.parametrize("shards", [1, 3])
def test_transformers_loads_a_rewritten_checkpoint(tmp_path: Path, shards: int) -> None:
    make_tiny(tmp_path / "source", naming="text", mtp=False, layers=2)
    with Checkpoint.open(tmp_path / "source") as source:
        tensors = {name: source.read(name) for name in source.tensors}
        with ShardWriter(tmp_path / "out", lay_out(tensors, shards)) as writer:
            for name in tensors:
                write(writer, name, source.read(name))
            writer.finish({"config.json": tmp_path / "source" / "config.json"})
    model, report = Qwen3_5MoeForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert {name: raw(tensor) for name, tensor in model.state_dict().items()} == {
        name: raw(tensor) for name, tensor in tensors.items()
    }
