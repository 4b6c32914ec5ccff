"""Where every output byte stands: tensors into shards, shards into offsets, before anything is written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from qconvert.core.dtypes import DType
from qconvert.core.plan import Layout, dtype_bytes
from qconvert.core.tensor_info import TensorInfo
from qconvert.io.safetensors_header import serialize_header
from qconvert.io.shard_writer import PYTORCH_METADATA

DEFAULT_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputTensor:
    """A tensor that a step will write."""

    name: str
    dtype: DType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return dtype_bytes(self.dtype, self.shape)


def lay_out(groups: Iterable[tuple[OutputTensor, ...]], shard_bytes: int = DEFAULT_SHARD_BYTES) -> Layout:
    """Fill shards of at most ``shard_bytes`` in order; a group stays together.

    A group is what one step gives, or several whose outputs are read as one.
    One larger than ``shard_bytes`` gets a shard of its own. Inside a shard wide element types come first, so
    that every tensor is aligned to its element: the format allows no gaps.
    """
    shards: list[list[OutputTensor]] = [[]]
    filled = 0
    for group in groups:
        size = sum(tensor.nbytes for tensor in group)
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].extend(group)
        filled += size
    infos: list[TensorInfo] = []
    for i, shard in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        infos.extend(_place(sorted(shard, key=lambda t: -t.dtype.itemsize), name))
        shard.clear()  # there may be a quarter of a million tensors: none twice
    return Layout(tensors=tuple(infos))


def _place(tensors: Sequence[OutputTensor], shard: str) -> tuple[TensorInfo, ...]:
    header = len(serialize_header(_side_by_side(tensors, shard, 0), PYTORCH_METADATA))
    return tuple(_side_by_side(tensors, shard, header))


def _side_by_side(tensors: Sequence[OutputTensor], shard: str, begin: int) -> Iterator[TensorInfo]:
    for tensor in tensors:
        end = begin + tensor.nbytes
        yield TensorInfo(name=tensor.name, dtype=tensor.dtype, shape=tensor.shape, shard=shard, begin=begin, end=end)
        begin = end
