"""The whole model equals transformers and a textbook one on text, images, videos and mixed batches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from reference_model.config import ModelConfig
from reference_model.config_fields import ConfigError
from reference_model.generate import generate
from reference_model.layerwise import run_layerwise
from reference_model.load import TensorDictSource, WeightError, load_weights
from reference_model.multimodal import MultimodalLM, Pictures
from reference_model.positions import prompt_positions, token_kinds
from reference_model.vision import VisionInputError
from tests.reference_model import textbook, textbook_vision, tiny, tiny_multimodal, upstream
from tests.reference_model.tiny_multimodal import CONFIG, VISION, Piece, Prompts, image, prompts, text, video
from tests.tolerances import tolerances

LIMITS = tolerances("reference_model")

BATCHES: dict[str, list[list[Piece]]] = {
    "text": [[text(9)]],
    "image": [[text(4), image(4, 6), text(5)]],
    "two images": [[image(2, 8), text(3), image(6, 4), text(2)]],
    "video": [[text(2), video(3, 4, 6), text(4)]],
    "image and video": [[text(2), video(2, 2, 8), text(1), image(4, 4), text(3)]],
    "batch": [[text(3), image(4, 4), text(9)], [text(2), image(2, 4), text(12)], [video(2, 4, 4), text(2)]],
}


def worst(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1.0))


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return tiny_multimodal.checkpoint()


@pytest.fixture(scope="module")
def ours(tensors: dict[str, Tensor]) -> MultimodalLM:
    return tiny_multimodal.model(tensors)


@pytest.fixture(scope="module")
def ours_fp64(tensors: dict[str, Tensor]) -> MultimodalLM:
    return tiny_multimodal.model(tensors, torch.float64)


@pytest.fixture(scope="module")
def theirs(tensors: dict[str, Tensor]) -> Any:
    return upstream.build_multimodal(tiny_multimodal.config_json(), tensors)


@pytest.fixture(scope="module")
def theirs_fp64(tensors: dict[str, Tensor]) -> Any:
    return upstream.build_multimodal(tiny_multimodal.config_json(), tensors, torch.float64)


def upstream_inputs(batch: Prompts, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """What transformers' forward is given for the same prompts; in fp64, exact weights of learned positions too."""
    inputs: dict[str, Any] = {
        "input_ids": batch.ids,
        "attention_mask": batch.mask,
        "mm_token_type_ids": token_kinds(CONFIG, batch.ids),
    }
    for kind, pictures, pixels in (
        ("image", batch.images, "pixel_values"),
        ("video", batch.videos, "pixel_values_videos"),
    ):
        if pictures is not None:
            inputs |= {pixels: pictures.pixels.to(dtype), f"{kind}_grid_thw": torch.tensor(pictures.grids)}
            if dtype == torch.float64:
                entries, weights = textbook_vision.padded_corners(VISION, list(pictures.grids))
                inputs |= {f"{kind}_interp_indices": entries, f"{kind}_interp_weights": weights}
    return inputs


@pytest.mark.parametrize("name", BATCHES)
def test_fp32_logits_equal_those_of_transformers(ours: MultimodalLM, theirs: Any, name: str) -> None:
    batch = prompts(BATCHES[name], left=True)
    expected = theirs(**upstream_inputs(batch)).logits
    got = ours(batch.ids, attention_mask=batch.mask, **batch.pictures).logits
    real = batch.mask.bool()
    assert worst(got[real], expected[real]) <= LIMITS["fp32_to_upstream"]


@pytest.mark.parametrize("name", BATCHES)
def test_fp64_logits_equal_those_of_transformers_without_its_casts(
    ours_fp64: MultimodalLM, theirs_fp64: Any, name: str
) -> None:
    batch = prompts(BATCHES[name], left=True)
    with upstream.LiftedCasts():
        expected = theirs_fp64(**upstream_inputs(batch, torch.float64)).logits
    assert expected.dtype == torch.float64
    got = ours_fp64(batch.ids, attention_mask=batch.mask, **batch.pictures).logits
    real = batch.mask.bool()
    assert worst(got[real], expected[real]) <= LIMITS["fp64_to_upstream"]


@pytest.mark.parametrize("name", ["two images", "image and video"])
def test_fp64_logits_equal_those_of_the_textbook(
    ours_fp64: MultimodalLM, tensors: dict[str, Tensor], name: str
) -> None:
    """The textbook decoder reads ids alone: what the towers see becomes further rows of its table."""
    batch = prompts(BATCHES[name])
    weights = dict(TensorDictSource.of_checkpoint(tensors).tensors)
    seen = {kind: textbook_features(weights, pictures) for kind, pictures in ((1, batch.images), (2, batch.videos))}
    ids, rows = [], [weights["embed_tokens.weight"].double()]
    for token, kind in zip(batch.ids[0].tolist(), token_kinds(CONFIG, batch.ids)[0].tolist(), strict=True):
        if kind:
            ids.append(sum(map(len, rows)))
            rows.append(seen[kind].pop(0)[None])
        else:
            ids.append(token)
    weights["embed_tokens.weight"] = torch.cat(rows)
    places = prompt_positions(CONFIG, batch.ids, image_grids=batch.grids("image"), video_grids=batch.grids("video"))
    triples = [(int(t), int(h), int(w)) for t, h, w in places[:, 0].T]
    expected = textbook.logits(tiny.config_json(), weights, ids, triples)
    assert worst(ours_fp64(batch.ids, **batch.pictures).logits[0], expected) <= LIMITS["fp64_to_textbook"]


def textbook_features(weights: dict[str, Tensor], pictures: Pictures | None) -> list[Tensor]:
    if pictures is None:
        return []
    tower = textbook.part(weights, "visual.")
    out, begin = [], 0
    for grid in pictures.grids:
        end = begin + grid[0] * grid[1] * grid[2]
        out += textbook_vision.tower_of_patches(VISION, tower, pictures.pixels[begin:end], grid)
        begin = end
    return out


def whole(model: MultimodalLM, batch: Prompts) -> Tensor:
    logits: Tensor = model(batch.ids, **batch.pictures).logits
    return logits


@pytest.mark.parametrize("cut", [1, 6, 12, 19, 23])
def test_prefill_in_two_parts_equals_one_even_inside_an_image(ours_fp64: MultimodalLM, cut: int) -> None:
    batch = prompts([[text(2), image(4, 6), text(1), video(2, 4, 4), text(4)]])
    embeddings = ours_fp64.embed(batch.ids, **batch.pictures)
    places = prompt_positions(CONFIG, batch.ids, image_grids=batch.grids("image"), video_grids=batch.grids("video"))
    parts, cache = [], None
    for part in (slice(0, cut), slice(cut, None)):
        out = ours_fp64(
            batch.ids[:, part], embeddings=embeddings[:, part], position_ids=places[:, :, part], cache=cache
        )
        parts.append(out.logits)
        cache = out.cache
    assert worst(torch.cat(parts, dim=1), whole(ours_fp64, batch)) <= LIMITS["fp64_split"]


def test_text_and_images_go_on_behind_a_cache(ours_fp64: MultimodalLM) -> None:
    """A conversation: prompt with an image, answer token by token, another image, another answer."""
    turns: list[list[Piece]] = [[text(3), image(4, 6), text(1)], [text(3)], [image(2, 8), video(2, 2, 4)], [text(4)]]
    batch = prompts([[piece for turn in turns for piece in turn]])
    parts, cache, begin, seen = [], None, 0, {"image": 0, "video": 0}
    for turn in turns:
        length = prompts([turn]).ids.shape[1]
        pictures = {}
        for kind, given_ in (("image", batch.images), ("video", batch.videos)):
            grids = tuple(piece.grid for piece in turn if piece.kind == kind)
            count = sum(f * r * c for f, r, c in grids)
            if grids and given_ is not None:
                pictures[f"{kind}s"] = Pictures(pixels=given_.pixels[seen[kind] : seen[kind] + count], grids=grids)
            seen[kind] += count
        steps = [slice(begin, begin + length)] if pictures else [slice(i, i + 1) for i in range(begin, begin + length)]
        for step in steps:
            out = ours_fp64(batch.ids[:, step], cache=cache, **pictures)
            parts.append(out.logits)
            cache = out.cache
        begin += length
    assert begin == batch.ids.shape[1]
    assert worst(torch.cat(parts, dim=1), whole(ours_fp64, batch)) <= LIMITS["fp64_split"]


def test_decoding_behind_images_equals_transformers(ours: MultimodalLM, theirs: Any) -> None:
    batch = prompts([[text(2), image(4, 6), text(3)], [video(2, 4, 4), text(2)]], left=True)
    inputs = upstream_inputs(batch)
    expected, got = theirs(**inputs), ours(batch.ids, attention_mask=batch.mask, **batch.pictures)
    delta = theirs.model.rope_deltas[:, 0]
    assert torch.equal(got.cache.next_position - got.cache.lengths, delta)
    mask = batch.mask
    for step in range(4):
        ids = tiny.tokens(2, 1, seed=step)
        mask = torch.cat((mask, torch.ones_like(ids)), dim=1)
        # Positions given, for transformers 5.23 takes those of the whole mask for one new token.
        places = (mask.sum(1) - 1 + delta).view(1, 2, 1).expand(3, 2, 1)
        expected = theirs(
            input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=expected.past_key_values
        )
        got = ours(ids, cache=got.cache)
        assert worst(got.logits, expected.logits) <= LIMITS["fp32_to_upstream"]


def continued(model: MultimodalLM, batch: Prompts, **options: Any) -> Tensor:
    places = prompt_positions(
        CONFIG,
        batch.ids,
        image_grids=batch.grids("image"),
        video_grids=batch.grids("video"),
        attention_mask=batch.mask,
    )
    embeddings = model.embed(batch.ids, **batch.pictures)
    made = generate(
        model, batch.ids, attention_mask=batch.mask, embeddings=embeddings, position_ids=places, stop_ids=(), **options
    )
    return made.tokens[:, batch.ids.shape[1] :]


def test_continuations_of_images_are_those_of_transformers_and_of_drafting(
    ours: MultimodalLM, ours_fp64: MultimodalLM, theirs: Any
) -> None:
    batch = prompts(BATCHES["batch"], left=True)
    got = continued(ours, batch, max_new_tokens=12)
    made = theirs.generate(**upstream_inputs(batch), max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert torch.equal(got, made[:, batch.ids.shape[1] :])
    plain = continued(ours_fp64, batch, max_new_tokens=12)
    assert torch.equal(continued(ours_fp64, batch, max_new_tokens=12, draft=3), plain)
    again = ours_fp64(
        torch.cat((batch.ids, plain), dim=1),
        attention_mask=torch.cat((batch.mask, torch.ones_like(plain)), dim=1),
        **batch.pictures,
    )
    assert torch.equal(again.logits[:, -13:-1].argmax(-1), plain)


@pytest.mark.parametrize("left", [True, False])
def test_every_row_of_a_batch_has_the_logits_that_it_has_alone(ours_fp64: MultimodalLM, left: bool) -> None:
    rows = BATCHES["batch"]
    batch = prompts(rows, left=left)
    got = ours_fp64(batch.ids, attention_mask=batch.mask, **batch.pictures).logits
    first = {"image": 0, "video": 0}
    for number, row in enumerate(rows):
        alone: dict[str, Pictures] = {}
        for kind, pictures in (("image", batch.images), ("video", batch.videos)):
            grids = tuple(piece.grid for piece in row if piece.kind == kind)
            count = sum(f * r * c for f, r, c in grids)
            if grids and pictures is not None:
                alone[f"{kind}s"] = Pictures(pixels=pictures.pixels[first[kind] : first[kind] + count], grids=grids)
            first[kind] += count
        real = batch.mask[number].bool()
        expected = ours_fp64(batch.ids[number : number + 1, real], **alone).logits[0]
        assert worst(got[number, real], expected) <= LIMITS["fp64_split"]


def test_an_image_changes_what_follows_it_and_nothing_before(ours_fp64: MultimodalLM) -> None:
    batch = prompts([[text(3), image(4, 6), text(2), image(2, 4), text(3)]])
    assert batch.images is not None
    pixels = batch.images.pixels.clone()
    pixels[24:] += 1
    before, after = (
        ours_fp64(batch.ids, images=Pictures(pixels=values, grids=batch.images.grids)).logits[0]
        for values in (batch.images.pixels, pixels)
    )
    second = 3 + 8 + 2 + 1
    assert worst(before[:second], after[:second]) <= LIMITS["fp64_split"]
    assert bool((before[second:] != after[second:]).any(-1).all())


def test_ways_of_attending_reach_the_tower_and_hidden_states_come_on_request(
    ours_fp64: MultimodalLM, tensors: dict[str, Tensor]
) -> None:
    batch = prompts(BATCHES["image and video"])
    plain = tiny_multimodal.model(tensors, torch.float64, "plain")
    assert all(block.attn.kind == "plain" for block in plain.visual.blocks)
    got = plain(batch.ids, **batch.pictures, keep_hidden_states=True)
    assert torch.equal(got.hidden_states[0], plain.embed(batch.ids, **batch.pictures))
    assert worst(got.logits, whole(ours_fp64, batch)) <= LIMITS["fp64_split"]
    last = ours_fp64(batch.ids, **batch.pictures, last_logits_only=True, rewindable=True)
    assert worst(last.logits, got.logits[:, -1:]) <= LIMITS["fp64_split"]
    behind = last.cache.rewind(last.cache.lengths - 2)
    again = ours_fp64(batch.ids[:, -2:], cache=behind).logits
    assert worst(again, got.logits[:, -2:]) <= LIMITS["fp64_split"]


def test_a_model_without_pictures_is_the_text_model(ours_fp64: MultimodalLM, tensors: dict[str, Tensor]) -> None:
    text_tensors = {name.replace("language_model.", ""): t for name, t in tensors.items() if ".visual." not in name}
    ids = tiny.tokens(2, 20).clamp(max=400)
    assert torch.equal(ours_fp64(ids).logits, tiny.model(text_tensors, torch.float64)(ids).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prompt_with_an_image_runs_layer_by_layer_to_the_same_bits(
    tensors: dict[str, Tensor], dtype: torch.dtype
) -> None:
    model = tiny_multimodal.model(tensors, dtype)
    batch, plain = prompts([[text(5), image(4, 6), text(70)]]), tiny.tokens(2, 11).clamp(max=400)
    places = prompt_positions(CONFIG, batch.ids, image_grids=batch.grids("image"))
    run = run_layerwise(
        CONFIG.text,
        TensorDictSource.of_checkpoint(tensors),
        [batch.ids, plain],
        dtype,
        position_ids=[places, None],
        embeddings=[model.embed(batch.ids, images=batch.images), None],
    )
    first, second = (part.logits for part in run)
    expected = model(batch.ids, images=batch.images).logits
    assert torch.equal(first.view_as(expected), expected)
    assert torch.equal(second.view(2, 11, -1), model(plain).logits)


def test_pictures_and_tokens_must_agree(ours: MultimodalLM) -> None:
    batch = prompts([[text(2), image(4, 4), image(2, 4)]])
    assert batch.images is not None
    with pytest.raises(VisionInputError, match=r"6 image tokens, but the 0 image grids \[\] make 0"):
        ours(batch.ids)
    with pytest.raises(VisionInputError, match="0 video tokens, but the 2 video grids"):
        ours(batch.ids, images=batch.images, videos=batch.images)
    with pytest.raises(VisionInputError, match=r"5 image tokens, but the 2 image grids .* make 6"):
        ours(batch.ids[:, :-2], images=batch.images)
    faults: list[tuple[Pictures, str]] = [
        (replace(batch.images, grids=torch.tensor(batch.images.grids)), r"grid 0 is tensor.* three whole numbers"),
        (replace(batch.images, grids=((4, 4), (2, 4))), r"grid 0 is \(4, 4\): expected frames, rows and columns"),
        (replace(batch.images, grids=((2, 2, 4), (1, 2, 4))), "2 frames are a video"),
        (replace(batch.images, grids=((0, 4, 4), (1, 2, 4))), "at least one frame"),
        (replace(batch.images, pixels=batch.images.pixels.byte()), r"pixels are torch.uint8 .* need floating-point"),
    ]
    for images, words in faults:
        with pytest.raises(VisionInputError, match=words):
            ours(batch.ids, images=images)
    with pytest.raises(VisionInputError, match="there are no grids"):
        ours(tiny.tokens(1, 3), images=Pictures(pixels=torch.zeros(0, 54), grids=()))
    with pytest.raises(ValueError, match=r"attention_mask is \[1, 4\], expected"):
        ours(batch.ids, images=batch.images, attention_mask=torch.ones(1, 4))
    with pytest.raises(ValueError, match="start is of 2 rows, the prompts are 1"):
        ours(batch.ids, images=batch.images, cache=ours(tiny.tokens(2, 3)).cache)
    with pytest.raises(ValueError, match="both given"):
        ours(batch.ids, images=batch.images, embeddings=ours.embed(batch.ids, images=batch.images))


def test_an_image_token_that_the_model_draws_is_text(ours_fp64: MultimodalLM) -> None:
    drawn = torch.tensor([[CONFIG.image_token_id]])
    cache = ours_fp64(tiny.tokens(1, 5).clamp(max=400)).cache
    got = ours_fp64(drawn, cache=cache)
    expected = ours_fp64(drawn, cache=cache, embeddings=ours_fp64.embed_tokens(drawn))
    assert torch.equal(got.logits, expected.logits)


def test_a_config_without_a_tower_or_its_tokens_is_refused() -> None:
    for config in (tiny_multimodal.config_json(vision_config=None), tiny_multimodal.config_json(video_token_id=None)):
        with pytest.raises(ConfigError, match="vision_config, image_token_id and video_token_id"):
            MultimodalLM(ModelConfig.from_dict(config))


def test_weights_of_decoder_and_tower_that_do_not_fit_are_one_error(tensors: dict[str, Tensor]) -> None:
    wrong = {name: tensor for name, tensor in tensors.items() if name != "model.visual.merger.norm.bias"}
    wrong["model.visual.pos_embed.weight"] = wrong["model.visual.pos_embed.weight"][1:]
    wrong["model.visual.blocks.2.norm1.weight"] = torch.zeros(48)
    wrong["model.language_model.norm.weight"] = torch.zeros(95)
    with pytest.raises(WeightError) as caught:
        load_weights(tiny_multimodal.empty(), TensorDictSource.of_checkpoint(wrong), torch.float32)
    for line in (
        "missing: visual.merger.norm.bias",
        "wrong shape: visual.pos_embed.weight is [24, 48], expected [25, 48]",
        "not a weight of the model: visual.blocks.2.norm1.weight",
        "wrong shape: norm.weight is [95], expected [96]",
    ):
        assert line in str(caught.value), line


def test_a_whole_model_gives_back_the_names_of_its_checkpoint(tensors: dict[str, Tensor]) -> None:
    state = tiny_multimodal.model(tensors).state_dict()
    stored = TensorDictSource.of_checkpoint(tensors).tensors
    assert state.keys() == stored.keys()
    assert all(torch.equal(state[name], stored[name]) for name in stored)
