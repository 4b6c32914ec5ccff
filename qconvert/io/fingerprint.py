"""A cheap sign of what weights a checkpoint holds, whatever files they are in and whenever these were copied."""

from __future__ import annotations

import torch
import xxhash

from qconvert.io.checkpoint import Checkpoint, byte_view


def fingerprint(checkpoint: Checkpoint) -> str:
    """xxh3-128 over ``config.json`` and every tensor's name, type, shape and middle row.

    Other weights of the same shapes, such as those of the same model trained further, have another one; the same
    weights in other files have the same.

    Raises:
        SourceError: a file ends early or cannot be read.
    """
    digest = xxhash.xxh3_128(checkpoint.config_hash.encode())
    for name, info in sorted(checkpoint.tensors.items()):
        digest.update(f"\0{name}\0{info.dtype}\0{info.shape}\0".encode())
        if len(info.shape) > 1 and info.numel:
            middle = info.numel // info.row_width // 2
            digest.update(_bytes(checkpoint, name, middle, middle + 1))
        elif info.numel:
            digest.update(_bytes(checkpoint, name))
    return digest.hexdigest()


def _bytes(checkpoint: Checkpoint, name: str, begin: int | None = None, end: int | None = None) -> memoryview:
    rows = checkpoint.read(name, begin, end).contiguous()
    return byte_view(rows.view(-1).view(torch.uint8))
