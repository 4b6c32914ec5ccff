"""Partial rotary position embedding with interleaved time / height / width positions, and YaRN.

A head's first R dimensions are rotated in R/2 planes (dimension i with i + R/2), plane i by the angle
``position * inverse_frequency[i]``. A token has three positions (time, height, width; equal for text) and each
plane listens to one of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from reference_model.config import TextConfig
from reference_model.config_fields import ConfigError
from reference_model.config_rope import RopeParameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """Cosines and sines of a batch of positions, both [B, T, R/2], in the dtype of the model."""

    cos: Tensor
    sin: Tensor


def inverse_frequencies(config: TextConfig) -> tuple[Tensor, float]:
    """Radians per position of each plane, fp32 [R/2], and the factor on cosines and sines.

    Plain: ``theta ** (-2i / R)`` and 1 (Su et al. 2021, arXiv 2104.09864). YaRN: see ``_yarn``.

    Raises:
        ConfigError: YaRN without ``factor`` or ``original_max_position_embeddings``.
    """
    rope = config.rope
    exponents = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32, device="cpu") / config.rotary_dim
    wavelengths = rope.rope_theta**exponents
    if rope.rope_type == "default":
        return 1.0 / wavelengths, 1.0
    return _yarn(rope, wavelengths, config.rotary_dim)


def _yarn(rope: RopeParameters, wavelengths: Tensor, rotary_dim: int) -> tuple[Tensor, float]:
    """YaRN: planes that turn often within the original context stay, slow ones are stretched by ``factor``.

    A plane that makes n turns over the original length L has index ``R * ln(L / (2 pi n)) / (2 ln theta)``. From the
    index of ``beta_fast`` turns to that of ``beta_slow`` turns the frequency goes linearly from f to f / factor.
    Cosines and sines grow by ``0.1 ln(factor) + 1`` unless the config names another factor
    (Peng et al. 2023, arXiv 2309.00071, sections 3.2 and 3.4).
    """
    factor, length = rope.factor, rope.original_max_position_embeddings
    if factor is None or length is None:
        raise ConfigError("YaRN needs rope_parameters.factor and rope_parameters.original_max_position_embeddings")

    def plane_with(turns: float) -> float:
        return rotary_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    first, last = plane_with(rope.beta_fast), plane_with(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)
    if first == last:
        last += 0.001  # a ramp of no width would divide by zero
    planes = torch.arange(rotary_dim // 2, dtype=torch.float32, device="cpu")
    keep = 1 - ((planes - first) / (last - first)).clamp(0, 1)
    # The order of these fp32 operations is that of the engines: one ulp here is 0.06 rad at position 1e6.
    frequencies = 1.0 / (factor * wavelengths) * (1 - keep) + 1.0 / wavelengths * keep
    return frequencies, _yarn_attention_factor(rope, factor)


def _yarn_attention_factor(rope: RopeParameters, factor: float) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def growth(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return growth(rope.mscale) / growth(rope.mscale_all_dim)
    return growth(1.0)


def axis_of_planes(sections: tuple[int, int, int]) -> Tensor:
    """Which of time (0), height (1), width (2) drives each plane: int64 [R/2].

    The axes are interleaved ``t h w t h w ...``; an axis that has used up its section leaves its turn to time.
    With sections (11, 11, 10), planes 1, 4, ..., 31 are height, 2, 5, ..., 29 width, the others time.
    """
    axes = torch.zeros(sum(sections), dtype=torch.int64, device="cpu")
    for axis in (1, 2):
        axes[axis : 3 * sections[axis] : 3] = axis
    return axes


def rotation(config: TextConfig, position_ids: Tensor, dtype: torch.dtype) -> Rotation:
    """Cosines and sines for ``position_ids`` [3, B, T].

    Angles are fp32 products whatever ``dtype`` is, as in every engine that runs these models: at position 1e6 they
    differ from exact ones by hundredths of a radian, and the weights were trained with them.
    """
    frequencies, factor = inverse_frequencies(config)
    axes = axis_of_planes(config.rope.mrope_section)
    positions = position_ids[axes.to(position_ids.device)].permute(1, 2, 0).to(torch.float32)
    angles = positions * frequencies.to(position_ids.device)
    return Rotation(cos=(angles.cos() * factor).to(dtype), sin=(angles.sin() * factor).to(dtype))


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Rotate the first R dimensions of each head of x [B, T, H, K] and pass the others.

    With a, b the two halves of the rotated part: ``(a cos - b sin, b cos + a sin)``.
    """
    half = by.cos.shape[-1]
    cos, sin = by.cos.unsqueeze(2), by.sin.unsqueeze(2)
    a, b, rest = torch.split(x, [half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)
