"""What stands before the decoder of a package with images: embeddings of prompts, and where their tokens are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import onnxruntime
import torch

from qconvert.core.errors import SourceError, UsageError
from qconvert.io.source_folder import EMBEDDING_FILE, VISION_FILE
from qconvert.onnx_export.session import Floats, Integers, check_ids, load
from qconvert.onnx_export.states import IMAGE_FEATURES, IMAGE_GRID, INPUT_IDS, INPUTS_EMBEDS, PIXEL_VALUES
from reference_model.config import ModelConfig, VisionConfig
from reference_model.positions import IMAGE, VIDEO, check_count, prompt_positions, token_kinds
from reference_model.vision import Grid, VisionInputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictures:
    """Images, or videos, in the order of their tokens: through the first prompt, then the second.

    Attributes:
        pixels: float32, one row a patch [P, C * pictures * size * size], in the merger's order (see
            ``reference_model.vision``); what transformers' processors call ``pixel_values``.
        grids: one an image or video: frames, rows and columns of patches.
    """

    pixels: Floats
    grids: tuple[Grid, ...]


class Embedder:
    """The embedding of a package and its vision tower, which is loaded when the first picture comes."""

    def __init__(self, folder: Path, config: ModelConfig, *, threads: int) -> None:
        """Load the embedding.

        Raises:
            SourceError: ONNX Runtime refuses its graph, or ``config`` has no tower.
        """
        if config.vision is None:
            raise SourceError(f"{folder}: the decoder takes embeddings, but config.json has no vision_config")
        self._folder, self._config, self._threads = folder, config, threads
        self._vision: VisionConfig = config.vision
        self._table = load(folder / EMBEDDING_FILE, threads)

    @cached_property
    def _tower(self) -> onnxruntime.InferenceSession:
        return load(self._folder / VISION_FILE, self._threads)

    def look_up(self, input_ids: Integers, features: Floats | None = None) -> Floats:
        """Embeddings [B, S, D] of the table, and of ``features`` [F, D] for image and video tokens, if given."""
        check_ids(input_ids, self._config.text.vocab_size)
        if features is None:
            features = np.zeros((0, self._config.text.hidden_size), np.float32)
        found: Floats = self._table.run([INPUTS_EMBEDS], {INPUT_IDS: input_ids, IMAGE_FEATURES: features})[0]
        return found

    def embed(self, input_ids: Integers, *, images: Pictures | None, videos: Pictures | None) -> Floats:
        """Embeddings [B, S, D] of prompts [B, S] with all their pictures.

        Raises:
            UsageError: pictures and their tokens do not agree in number, or pixels and grids contradict each other.
        """
        check_ids(input_ids, self._config.text.vocab_size)
        kinds = token_kinds(self._config, torch.from_numpy(input_ids))
        given = {IMAGE: images, VIDEO: videos}
        try:
            for kind, pictures in given.items():
                grids = () if pictures is None else pictures.grids
                check_count(kinds, kind, grids, self._vision.spatial_merge_size)
        except VisionInputError as error:
            raise UsageError(str(error)) from None
        of_pictures = kinds[kinds != 0].numpy()
        features = np.zeros((len(of_pictures), self._config.text.hidden_size), np.float32)
        for kind, pictures in given.items():
            if pictures is not None:
                features[of_pictures == kind] = self._see(pictures)
        return self.look_up(input_ids, features)

    def positions(
        self,
        input_ids: Integers,
        *,
        images: Pictures | None,
        videos: Pictures | None,
        attention_mask: Integers | None,
        start: Integers | None,
    ) -> Integers:
        """Positions int64 [3, B, S] of prompts with all their pictures, see ``prompt_positions``.

        Raises:
            UsageError: pictures and their tokens do not agree, or ids that are none.
        """
        check_ids(input_ids, self._config.text.vocab_size)
        try:
            found = prompt_positions(
                self._config,
                torch.from_numpy(input_ids),
                image_grids=() if images is None else images.grids,
                video_grids=() if videos is None else videos.grids,
                attention_mask=None if attention_mask is None else torch.from_numpy(attention_mask != 0),
                start=None if start is None else torch.from_numpy(start),
            )
        except ValueError as error:
            raise UsageError(str(error)) from None
        positions: Integers = found.numpy()
        return positions

    def _see(self, pictures: Pictures) -> Floats:
        """Embeddings of pictures: [P / m^2, D]."""
        vision = self._vision
        width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        expected = (sum(math.prod(grid) for grid in pictures.grids), width)
        if pictures.pixels.shape != expected or pictures.pixels.dtype != np.float32:
            raise UsageError(
                f"pixels are {pictures.pixels.dtype} {list(pictures.pixels.shape)}, expected float32 {list(expected)}: "
                f"one row a patch of the grids {[list(grid) for grid in pictures.grids]}"
            )
        grids = np.asarray(pictures.grids, np.int64).reshape(-1, 3)
        found: Floats = self._tower.run([IMAGE_FEATURES], {PIXEL_VALUES: pictures.pixels, IMAGE_GRID: grids})[0]
        return found
