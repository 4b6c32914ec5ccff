"""The tiny model of these tests with a vision tower, and prompts of text, images and videos."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from reference_model.attention import AttentionKind
from reference_model.config import ModelConfig, VisionConfig
from reference_model.load import TensorDictSource, load_weights
from reference_model.multimodal import MultimodalLM, Pictures
from reference_model.vision import Grid, VisionTower, start_vision
from tests.checkpoints import tiny_config
from tests.reference_model import tiny

VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 48,
    "intermediate_size": 44,
    "num_heads": 3,
    "in_channels": 3,
    "patch_size": 3,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 96,
    "num_position_embeddings": 25,
}


def config_json(**changes: Any) -> dict[str, Any]:
    """``tiny.config_json`` as the ``text_config`` of a vision-language ``config.json``."""
    return tiny_config(naming="vl") | {"text_config": tiny.config_json(), "vision_config": VISION} | changes


CONFIG = ModelConfig.from_dict(config_json())


def checkpoint(seed: int = 0) -> dict[str, Tensor]:
    """Weights by hub name, fp32."""
    tower = VisionTower(VisionConfig.from_dict(VISION))
    start_vision(tower, seed)
    tensors = {
        name.replace("model.", "model.language_model.", 1): tensor for name, tensor in tiny.checkpoint(seed).items()
    }
    return tensors | {f"model.visual.{name}": tensor for name, tensor in tower.state_dict().items()}


def empty(attention: AttentionKind = "sdpa") -> MultimodalLM:
    with torch.device("meta"):
        return MultimodalLM(CONFIG, attention)


def model(
    tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32, attention: AttentionKind = "sdpa"
) -> MultimodalLM:
    built = empty(attention)
    load_weights(built, TensorDictSource.of_checkpoint(tensors), dtype)
    return built.requires_grad_(False)


Kind = Literal["text", "image", "video"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Some tokens of text, or one image or video."""

    kind: Kind
    tokens: int = 0
    grid: Grid = (0, 0, 0)


def text(tokens: int) -> Piece:
    return Piece(kind="text", tokens=tokens)


def image(rows: int, columns: int) -> Piece:
    return Piece(kind="image", grid=(1, rows, columns))


def video(frames: int, rows: int, columns: int) -> Piece:
    return Piece(kind="video", grid=(frames, rows, columns))


def flat(pieces: Iterable[Piece]) -> list[Piece]:
    """Pieces as they stand in a prompt: markers around images, frames of videos apart and behind their times."""
    out: list[Piece] = []
    for piece in pieces:
        frames, rows, columns = piece.grid
        for _ in range(frames):
            begin = 3 if piece.kind == "video" else 1
            out += [text(begin), Piece(kind=piece.kind, grid=(1, rows, columns)), text(1)]
        if piece.kind == "text":
            out.append(piece)
    return out


def size(piece: Piece) -> int:
    return piece.tokens if piece.kind == "text" else math.prod(piece.grid) // 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """A batch: ids [B, T], with an attention mask where rows were padded, and the pictures of all rows."""

    ids: Tensor
    mask: Tensor
    images: Pictures | None
    videos: Pictures | None

    @property
    def pictures(self) -> dict[str, Pictures | None]:
        return {"images": self.images, "videos": self.videos}

    def grids(self, kind: Kind) -> list[Grid]:
        pictures = self.images if kind == "image" else self.videos
        return [] if pictures is None else list(pictures.grids)


def prompts(rows: Sequence[Sequence[Piece]], *, left: bool = False, seed: int = 0) -> Prompts:
    """Ids and pixels of rows of pieces, padded to the longest with id 0."""
    gen = torch.Generator().manual_seed(seed)
    token = {"image": CONFIG.image_token_id, "video": CONFIG.video_token_id}
    ids, pixels, grids = [], {"image": [], "video": []}, {"image": [], "video": []}
    for row in rows:
        row_ids = []
        for piece in flat(row):
            if piece.kind == "text":
                row_ids.append(torch.randint(1, 400, (piece.tokens,), generator=gen))
            else:
                row_ids.append(torch.full((size(piece),), token[piece.kind]))
        ids.append(torch.cat(row_ids))
        for piece in row:
            if piece.kind != "text":
                pixels[piece.kind].append(torch.randn(math.prod(piece.grid), 54, generator=gen))
                grids[piece.kind].append(piece.grid)
    longest = max(len(row) for row in ids)
    pads = [longest - len(row) for row in ids]
    sides = [(pad, 0) if left else (0, pad) for pad in pads]
    return Prompts(
        ids=torch.stack([torch.nn.functional.pad(row, side) for row, side in zip(ids, sides, strict=True)]),
        mask=torch.stack(
            [torch.nn.functional.pad(torch.ones_like(row), side) for row, side in zip(ids, sides, strict=True)]
        ),
        images=_pictures(pixels["image"], grids["image"]),
        videos=_pictures(pixels["video"], grids["video"]),
    )


def _pictures(pixels: list[Tensor], grids: list[Grid]) -> Pictures | None:
    return Pictures(pixels=torch.cat(pixels), grids=tuple(grids)) if grids else None
