"""The whole model: tokens, images and videos to logits.

``state_dict`` keys are those of ``CausalLM`` and, under ``visual.``, those of the vision tower.

Shapes: B batch, T tokens, D hidden, P patches.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from reference_model.attention import AttentionKind
from reference_model.cache import Cache
from reference_model.config import ModelConfig
from reference_model.config_fields import ConfigError
from reference_model.model import CausalLM, Output
from reference_model.positions import IMAGE, VIDEO, check_count, prompt_positions, token_kinds
from reference_model.span import check_ids
from reference_model.vision import Grid, VisionTower


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictures:
    """Images, or videos, in the order of their tokens: through the first prompt, then the second.

    Attributes:
        pixels: one row a patch [P, C * pictures * size * size], in the merger's order (see ``vision``).
        grids: one an image or video: frames, rows and columns of patches.
    """

    pixels: Tensor
    grids: tuple[Grid, ...]


class MultimodalLM(CausalLM):
    """``CausalLM`` whose image and video tokens take their embeddings from a vision tower, and have three positions."""

    def __init__(self, config: ModelConfig, attention: AttentionKind = "sdpa") -> None:
        """Build the decoder and the tower.

        Raises:
            ConfigError: the config has no vision tower, or does not say which tokens are images and videos.
        """
        super().__init__(config.text, attention)
        if config.vision is None or config.image_token_id is None or config.video_token_id is None:
            raise ConfigError("a multimodal model needs vision_config, image_token_id and video_token_id")
        self.model_config = config
        self.visual = VisionTower(config.vision, attention)

    def embed(self, input_ids: Tensor, *, images: Pictures | None = None, videos: Pictures | None = None) -> Tensor:
        """Embeddings [B, T, D] of prompts [B, T]: of the table for text, of the tower for image and video tokens.

        Raises:
            VisionInputError: pictures and their tokens do not agree in number, or pixels and grids contradict each
                other.
            ValueError: ids are not of the vocabulary or not [B, T].
        """
        check_ids(self.config, input_ids)
        kinds = token_kinds(self.model_config, input_ids)
        embeddings: Tensor = self.embed_tokens(input_ids)
        for kind, pictures in ((IMAGE, images), (VIDEO, videos)):
            grids = () if pictures is None else pictures.grids
            check_count(kinds, kind, grids, self.visual.config.spatial_merge_size)
            if pictures is not None:
                seen = self.visual(pictures.pixels, grids).to(embeddings.dtype)
                embeddings = embeddings.masked_scatter((kinds == kind).unsqueeze(-1), seen)
        return embeddings

    def forward(
        self,
        input_ids: Tensor,
        *,
        images: Pictures | None = None,
        videos: Pictures | None = None,
        attention_mask: Tensor | None = None,
        embeddings: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        keep_hidden_states: bool = False,
        last_logits_only: bool = False,
        rewindable: bool = False,
    ) -> Output:
        """Run tokens [B, T] and their pictures after those of ``cache``; what else there is as in ``CausalLM``.

        Behind a cache and without pictures all tokens are text: a model may draw the id of an image token itself.

        Raises:
            VisionInputError: pictures and their tokens do not agree, or pixels and grids contradict each other.
            ValueError: pictures together with ``embeddings``, which stand for them already.
        """
        pictured = images is not None or videos is not None
        if pictured and embeddings is not None:
            raise ValueError("pictures and embeddings were both given; embed() puts pictures into embeddings")
        if embeddings is None and (pictured or cache is None):
            embeddings = self.embed(input_ids, images=images, videos=videos)
        if position_ids is None and pictured:
            position_ids = prompt_positions(
                self.model_config,
                input_ids,
                image_grids=() if images is None else images.grids,
                video_grids=() if videos is None else videos.grids,
                attention_mask=attention_mask,
                start=None if cache is None else cache.next_position,
            )
        return super().forward(
            input_ids,
            attention_mask=attention_mask,
            embeddings=embeddings,
            position_ids=position_ids,
            cache=cache,
            keep_hidden_states=keep_hidden_states,
            last_logits_only=last_logits_only,
            rewindable=rewindable,
        )
