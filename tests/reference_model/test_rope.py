"""Rotary embedding: the same fp32 angles as transformers, bit for bit, at any position and with YaRN."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen3_5MoeTextConfig
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeTextRotaryEmbedding

from reference_model.config_fields import ConfigError
from reference_model.presets import PRESETS
from reference_model.rope import axis_of_planes, inverse_frequencies, rotate, rotation
from tests.reference_model import tiny, upstream
from tests.reference_model.test_model import worst
from tests.tolerances import tolerances

LIMITS = tolerances("reference_model")

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262_144}
BLOCKS: list[dict[str, Any]] = [
    {},
    YARN,
    {**YARN, "attention_factor": 0.7},
    {**YARN, "mscale": 0.8, "mscale_all_dim": 1.3},
    {**YARN, "mscale": 0.8},
    {**YARN, "truncate": False},
    {**YARN, "beta_fast": 20.0, "beta_slow": 2.0, "factor": 2.5},
    {**YARN, "factor": 1.0},
    {**YARN, "original_max_position_embeddings": 7, "rope_theta": 100.0},
]


def real_block(**changes: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25, "mrope_section": [11, 11, 10]}
    return {"head_dim": 256, "rope_parameters": {**rope, "mrope_interleaved": True, **changes}}


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("start", [0, 262_100, 1_000_000])
def test_cosines_and_sines_equal_those_of_transformers(block: dict[str, Any], start: int) -> None:
    changes = real_block(**block)
    theirs = Qwen3_5MoeTextRotaryEmbedding(Qwen3_5MoeTextConfig(**tiny.config_json(**changes)))
    positions = start + torch.randint(0, 90, (3, 2, 40), generator=torch.Generator().manual_seed(0))
    cos, sin = theirs(torch.zeros(1), positions)
    ours = rotation(tiny.text_config(**changes), positions, torch.float32)
    assert torch.equal(torch.cat((ours.cos, ours.cos), dim=-1), cos)
    assert torch.equal(torch.cat((ours.sin, ours.sin), dim=-1), sin)


def test_sections_are_interleaved() -> None:
    axes = axis_of_planes((11, 11, 10)).tolist()
    assert axes[:6] == [0, 1, 2, 0, 1, 2]
    assert axes[-3:] == [2, 0, 1]
    assert [axes.count(axis) for axis in (0, 1, 2)] == [11, 11, 10]


def test_angles_stay_fp32_products_in_an_fp64_model() -> None:
    config = PRESETS["35b-a3b"].text
    positions = torch.full((3, 1, 1), 999_983)
    frequencies, _ = inverse_frequencies(config)
    wide = rotation(config, positions, torch.float64)
    assert wide.cos.dtype == torch.float64
    assert torch.equal(wide.cos[0, 0], (positions[0, 0].float() * frequencies).cos().double())


@given(seed=st.integers(0, 1000), furthest=st.sampled_from([1, 99, 262_144, 1_048_576]))
def test_rotation_keeps_lengths_and_leaves_the_rest_of_a_head(seed: int, furthest: int) -> None:
    config, gen = tiny.text_config(), torch.Generator().manual_seed(seed)
    x = torch.randn(2, 9, 3, config.head_dim, dtype=torch.float64, generator=gen)
    turned = rotate(x, rotation(config, torch.randint(0, furthest, (3, 2, 9), generator=gen), torch.float64))
    rotary = config.rotary_dim
    assert torch.equal(turned[..., rotary:], x[..., rotary:])
    half = rotary // 2
    for part in range(half):
        plane = [part, part + half]
        after, before = turned[..., plane].norm(dim=-1), x[..., plane].norm(dim=-1)
        assert torch.allclose(after, before, rtol=LIMITS["fp32_rotation"], atol=0)


@given(seed=st.integers(0, 1000), first=st.integers(0, 99), apart=st.integers(0, 99), shift=st.integers(0, 99))
def test_scores_depend_on_distance_alone(seed: int, first: int, apart: int, shift: int) -> None:
    config, gen = tiny.text_config(), torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 1, 1, 1, config.head_dim, dtype=torch.float64, generator=gen)

    def cosine(i: int, j: int) -> float:
        at = [rotation(config, torch.full((3, 1, 1), p), torch.float64) for p in (i, j)]
        return float((rotate(q, at[0]) * rotate(k, at[1])).sum() / (q.norm() * k.norm()))

    here = cosine(first + apart, first)
    assert abs(here - cosine(first + apart + shift, first + shift)) <= LIMITS["fp32_distance"]
    # At another distance the score is another one.
    assert max(abs(here - cosine(first + apart + more, first)) for more in (1, 2, 3)) > LIMITS["fp32_distance"]


@pytest.mark.parametrize("missing", ["factor", "original_max_position_embeddings"])
def test_yarn_without_its_numbers_is_an_error(missing: str) -> None:
    block = {name: value for name, value in YARN.items() if name != missing}
    with pytest.raises(ConfigError, match=missing):
        tiny.text_config(**real_block(**block))


@pytest.mark.parametrize("start", [0, 262_100, 1_000_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_whole_model_with_yarn_equals_transformers_beyond_its_original_length(start: int, dtype: torch.dtype) -> None:
    """By explicit positions, the same on all three axes and different ones; and further on, one after another."""
    rope = {**tiny.config_json()["rope_parameters"], **YARN}
    changes = {"rope_parameters": rope, "max_position_embeddings": 1_048_576}
    tensors, ids = tiny.checkpoint(), tiny.tokens(2, 60)
    ours, theirs = tiny.model(tensors, dtype, **changes), upstream.build(tiny.config_json(**changes), tensors, dtype)
    limit = LIMITS["fp64_to_upstream" if dtype == torch.float64 else "fp32_to_upstream"]
    line = start + torch.arange(60).expand(3, 2, 60)
    for positions in (line, start + torch.randint(0, 90, (3, 2, 60), generator=torch.Generator().manual_seed(0))):
        output = ours(ids, position_ids=positions)
        with upstream.LiftedCasts():
            expected = theirs(ids, position_ids=positions).logits
        assert worst(output.logits, expected) <= limit
    plain = tiny.model(tensors, dtype)
    assert worst(plain(ids, position_ids=line).logits, ours(ids, position_ids=line).logits) > LIMITS["visible"]
    first = ours(ids[:, :40], position_ids=line[:, :, :40])
    assert first.cache.next_position.tolist() == [start + 40] * 2
    assert worst(ours(ids[:, 40:], cache=first.cache).logits, ours(ids, position_ids=line).logits[:, 40:]) <= limit
