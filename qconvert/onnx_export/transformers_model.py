"""A package behind transformers' ``generate``: sampling, beams of one, stopping criteria, streamers.

optimum's ONNX classes cannot serve this model: optimum-onnx 0.1 does not know it, and needs a transformers older than
the one that does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from qconvert.core.errors import UsageError
from qconvert.onnx_export.embedder import Pictures
from qconvert.onnx_export.generate import PREFILL_TOKENS
from qconvert.onnx_export.runtime import Package, PackageOutput
from qconvert.onnx_export.session import PackageCache

_PICTURES = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
"""What transformers' processors give beside tokens."""


class PackageForCausalLM(GenerationMixin):
    """The decoder of a package as transformers 5 expects a model that generates.

    Keys, values and the states of linear attention travel as one cache. It cannot be cut back, so ``generate`` refuses
    what needs that: assisted decoding and beams.
    """

    main_input_name = "input_ids"
    base_model_prefix = ""
    _is_stateful = True

    def __init__(self, folder: Path, *, threads: int = 0) -> None:
        """See ``from_pretrained``."""
        self.package = Package(folder, threads=threads)
        self.config = AutoConfig.from_pretrained(folder)
        self.generation_config = GenerationConfig.from_model_config(self.config)
        if (folder / "generation_config.json").is_file():
            self.generation_config = GenerationConfig.from_pretrained(folder)
        self.device = torch.device("cpu")
        self.dtype = torch.float32

    @classmethod
    def from_pretrained(cls, folder: Path | str, *, threads: int = 0) -> PackageForCausalLM:
        """Load the package in ``folder``; ``threads`` 0 leaves their number to ONNX Runtime.

        Raises:
            SourceError: no package, or ONNX Runtime refuses it.
        """
        return cls(Path(folder), threads=threads)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def get_experts_implementation(self) -> dict[str, str]:
        """None to choose from: the graph has its own."""
        return {}

    def can_generate(self) -> bool:
        """Yes."""
        return True

    def prepare_inputs_for_generation(  # type: ignore[override]  # named as generate passes them
        self,
        input_ids: Tensor,
        past_key_values: PackageCache | None = None,
        attention_mask: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,  # so named, generate lets through what forward takes
    ) -> dict[str, Any]:
        """The tokens that the cache has not seen, their part of the mask, and the pictures of a new prompt."""
        seen = 0 if past_key_values is None else past_key_values.mask.shape[1]
        new_mask = None if attention_mask is None else attention_mask[:, seen:]
        pictures = {name: kwargs[name] for name in _PICTURES if name in kwargs} if is_first_iteration else {}
        new = {"input_ids": input_ids[:, seen:], "attention_mask": new_mask, "past_key_values": past_key_values}
        return {**new, **pictures}

    def __call__(self, *args: Any, **kwargs: Any) -> CausalLMOutputWithPast:
        """See ``forward``."""
        return self.forward(*args, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: PackageCache | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Run new tokens int64 [B, S] with their mask [B, S]; logits of the last part of a long prompt only.

        Pictures are named as transformers' processors name them; which tokens are theirs the ids say themselves, so
        that ``mm_token_type_ids`` is not looked at.
        """
        ids = input_ids.numpy()
        mask = np.ones_like(ids) if attention_mask is None else attention_mask.numpy()
        cache, out = past_key_values, None
        images, videos = _pictures(pixel_values, image_grid_thw), _pictures(pixel_values_videos, video_grid_thw)
        embeddings = positions = None
        if images is not None or videos is not None:
            embeddings = self.package.embed(ids, images=images, videos=videos)
            positions = self.package.positions(ids, images=images, videos=videos, attention_mask=mask, cache=cache)
        for begin in range(0, ids.shape[1], PREFILL_TOKENS):
            part = slice(begin, begin + PREFILL_TOKENS)
            out = self.package.forward(
                ids[:, part],
                attention_mask=mask[:, part],
                position_ids=None if positions is None else positions[:, :, part],
                embeddings=None if embeddings is None else embeddings[:, part],
                cache=cache,
            )
            cache = out.cache
        return _result(out)


def _pictures(pixels: Tensor | None, grids: Tensor | None) -> Pictures | None:
    """Pixels [P, ...] and grids int64 [N, 3] as the package takes them.

    Raises:
        UsageError: one without the other.
    """
    if (pixels is None) != (grids is None):
        raise UsageError("pixels and their grids (image_grid_thw, video_grid_thw) were not both given")
    if pixels is None or grids is None:
        return None
    return Pictures(pixels=pixels.float().numpy(), grids=tuple(tuple(grid) for grid in grids.tolist()))


def _result(out: PackageOutput | None) -> CausalLMOutputWithPast:
    if out is None:
        raise ValueError("no tokens were given that the cache has not seen")
    return CausalLMOutputWithPast(logits=torch.from_numpy(out.logits), past_key_values=out.cache)  # type: ignore[arg-type]  # generate hands any cache back
