"""What a checkpoint must say of images, and which of its files nobody needs in a package that takes none."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from qconvert.core.errors import PlanError
from reference_model.config import ModelConfig

IMAGE_PROCESSOR = "preprocessor_config.json"

WHOLE_PROCESSOR = "processor_config.json"

PROCESSORS = (IMAGE_PROCESSOR, "video_preprocessor_config.json", WHOLE_PROCESSOR)
"""Files of a checkpoint that say how to prepare images."""


def unused_processors(files: Iterable[str]) -> dict[str, str]:
    """Those of ``files`` that say how to prepare images, with the reason why a text package leaves them out."""
    return {name: "prepares images, of which the package takes none" for name in files if name in PROCESSORS}


def check_picture_tokens(config: ModelConfig, path: Path) -> None:
    """Raise ``PlanError`` where ``config.json`` does not name the tokens of images and videos."""
    for field in ("image_token_id", "video_token_id", "vision_start_token_id"):
        token = getattr(config, field)
        if token is None or token >= config.text.vocab_size:
            raise PlanError(
                f"{path}: {field} is {token} in config.json, expected a token of the vocabulary 0 .. "
                f"{config.text.vocab_size - 1}: without it prompts show no images. Name it, or export with --no-vision"
            )
    if config.image_token_id == config.video_token_id:
        raise PlanError(
            f"{path}: image_token_id and video_token_id are both {config.image_token_id} in config.json: nobody can "
            "tell images from videos. Correct one, or export with --no-vision"
        )


def picture_tokens(config: ModelConfig) -> tuple[int, ...]:
    """The tokens whose embeddings come from the vision tower."""
    return tuple(token for token in (config.image_token_id, config.video_token_id) if token is not None)
