"""What a checkpoint folder holds: which files carry weights, which come along, which stay behind and why."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from qconvert.core.errors import SourceError
from qconvert.io.strict_json import parse_object

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"

MODEL_FILE = "model.onnx"
MTP_FILE = "mtp.onnx"
VISION_FILE = "vision.onnx"
EMBEDDING_FILE = "embedding.onnx"
GENAI_CONFIG = "genai_config.json"
GENAI_PROCESSOR = "genai_processor.json"
PACKAGE_FILES = (MODEL_FILE, GENAI_CONFIG)
"""What an ONNX package has beside its weights."""
SINGLE_FILE = "model.safetensors"
WEIGHTS_SUFFIX = ".safetensors"

MAX_JSON_BYTES = 100_000_000
"""As for headers of weights: a larger file is refused before memory is taken for it."""

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_LEFT_OUT: tuple[tuple[tuple[str, ...], str], ...] = (
    ((WEIGHTS_SUFFIX,), "weights that the index does not name"),
    (_PICKLE_SUFFIXES, "pickled data"),
    ((".py",), "code"),
    ((".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".npz", ".npy"), "weights in another format"),
    ((".index.json",), "an index of other weights"),
)
_DESCRIBES_SOURCE = {
    "README.md": "describes the source, not the output",
    "quantize_config.json": "describes the source's quantization",
    "quant_config.json": "describes the source's quantization",
    "quantization_config.json": "describes the source's quantization",
    "hf_quant_config.json": "describes the source's quantization",
    "recipe.yaml": "describes the source's quantization",
    "manifest.json": "describes how the source was made",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SideFile:
    """A file that comes along unchanged: tokenizer, chat template, processor, generation settings, licence."""

    name: str
    path: Path
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """The top level of a checkpoint folder, sorted out; subfolders are never entered.

    Attributes:
        shards: names of the files with weights, sorted.
        weight_map: tensor name -> shard by the index; ``None`` for a single file without one.
        left_out: name -> reason of everything that does not come along.
    """

    shards: tuple[str, ...]
    weight_map: dict[str, str] | None
    side_files: tuple[SideFile, ...]
    left_out: dict[str, str]


def is_package(path: Path) -> bool:
    """Whether a folder holds an ONNX package, whose weights are those of a graph."""
    return all((path / name).is_file() for name in PACKAGE_FILES)


def survey(path: Path, *, package: bool = False) -> Folder:
    """Sort out the folder ``path``.

    Names are confined to the folder; its links are followed, for the hub's cache consists of links. With ``package`` it
    is an ONNX package, whose files of weights have no index: the graphs say which are whose.

    Raises:
        SourceError: no folder, no weights, pickled weights only, an index that is damaged or names a path outside,
            several files without an index, or an index beside an unsplit file that it does not name.
    """
    names = _list(path)
    if package:
        weights = tuple(name for name in names if name.endswith(WEIGHTS_SUFFIX))
        return Folder(shards=weights, weight_map=None, side_files=(), left_out={})
    if is_package(path):
        raise SourceError(
            f"{path} is an ONNX package, not a checkpoint: `qconvert inspect`, `verify`, `parity` and `run` take "
            "it; for anything else give the checkpoint that it was made from"
        )
    weight_map = _weight_map(path) if INDEX_FILE in names else None
    shards = tuple(sorted(set(weight_map.values()))) if weight_map is not None else (_single(path, names),)
    if weight_map is not None and SINGLE_FILE in names and SINGLE_FILE not in shards:
        raise SourceError(
            f"{path}: holds {SINGLE_FILE} and an index that does not name it, and engines read different ones; "
            "remove the stale one"
        )
    side_files: list[SideFile] = []
    left_out: dict[str, str] = {}
    for name in names:
        if name in shards or name in (CONFIG_FILE, INDEX_FILE):
            continue
        reason, size = _reason(path / name)
        if reason:
            left_out[name] = reason
        else:
            side_files.append(SideFile(name=name, path=path / name, nbytes=size))
    return Folder(shards=shards, weight_map=weight_map, side_files=tuple(side_files), left_out=left_out)


def open_regular(path: Path) -> int:
    """A file descriptor of the regular file at ``path``, its links followed.

    Raises:
        SourceError: missing, unreadable, or a folder, pipe or device.
    """
    try:
        # A pipe without a writer would block for ever.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        dangling = isinstance(error, FileNotFoundError) and path.is_symlink()
        hint = "; its link leads nowhere" if dangling else ""
        raise SourceError(f"cannot read {path}: {error.strerror}{hint}") from error
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        raise SourceError(f"cannot read {path}: expected a file, found {file_kind(mode)}")
    return fd


def read_whole(path: Path) -> bytes:
    """Bytes of a file that describes weights.

    Raises:
        SourceError: as ``open_regular``, or larger than any description is.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        try:
            raw = file.read(MAX_JSON_BYTES + 1) if os.fstat(file.fileno()).st_size <= MAX_JSON_BYTES else None
        except OSError as error:
            raise SourceError(f"cannot read {path}: {error.strerror}") from error
    if raw is None or len(raw) > MAX_JSON_BYTES:
        raise SourceError(f"{path}: larger than {MAX_JSON_BYTES} bytes, so not what its name says")
    return raw


def plain_name(name: object) -> bool:
    """Whether ``name`` stands for a file directly inside a folder, whatever the operating system."""
    return (
        isinstance(name, str)
        and name.isprintable()
        and name not in ("", ".", "..")
        and not any(separator in name for separator in "/\\:")
    )


def file_kind(mode: int) -> str:
    """What a file's mode says it is, for messages."""
    for test, word in ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket")):
        if test(mode):
            return word
    return "a device"


def _list(path: Path) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except FileNotFoundError:
        raise SourceError(f"{path}: no such folder") from None
    except NotADirectoryError:
        raise SourceError(
            f"{path}: expected a checkpoint folder with {CONFIG_FILE}, found a file; give the folder that it is in"
        ) from None
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from error


def _single(path: Path, names: list[str]) -> str:
    found = [name for name in names if name.endswith(WEIGHTS_SUFFIX)]
    if SINGLE_FILE in found:
        return SINGLE_FILE
    if len(found) == 1:
        return found[0]
    if found:
        raise SourceError(
            f"{path}: {len(found)} {WEIGHTS_SUFFIX} files but no {INDEX_FILE} that says which tensors are in which; "
            "download the index too"
        )
    pickled = next((name for name in names if name.endswith(_PICKLE_SUFFIXES)), None)
    if pickled:
        raise SourceError(
            f"{path}: weights are pickled ({pickled}), which can run code when loaded; "
            f"convert them to {WEIGHTS_SUFFIX} first"
        )
    raise SourceError(f"{path}: no checkpoint, expected {INDEX_FILE} or one {WEIGHTS_SUFFIX} file")


def _weight_map(path: Path) -> dict[str, str]:
    file = path / INDEX_FILE
    weight_map = parse_object(read_whole(file), str(file)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{file}: expected a 'weight_map' from tensor names to files")
    for tensor, shard in weight_map.items():
        if not plain_name(shard) or not shard.endswith(WEIGHTS_SUFFIX):
            raise SourceError(
                f"{file}: {tensor!r} should be in a {WEIGHTS_SUFFIX} file of this folder, not in {shard!r}"
            )
    return weight_map


def _reason(path: Path) -> tuple[str | None, int]:
    name = path.name
    if name.startswith("."):
        return "hidden", 0
    if not plain_name(name):
        return "its name is not plain on every system", 0
    if name in _DESCRIBES_SOURCE:
        return _DESCRIBES_SOURCE[name], 0
    for suffixes, reason in _LEFT_OUT:
        if name.endswith(suffixes):
            return reason, 0
    try:
        status = path.stat()
    except OSError as error:
        raise SourceError(
            f"cannot read {path}: {error.strerror}; a link that leads nowhere is left by an interrupted download: "
            "download the checkpoint again, or remove the file"
        ) from error
    if not stat.S_ISREG(status.st_mode):
        return f"{file_kind(status.st_mode)}, not a file", 0
    return None, status.st_size
