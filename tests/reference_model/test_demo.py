"""On trained weights and real text: BF16 is no further from transformers' BF16 than that is from its own fp32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import reference_model
from qconvert.weights.source import CheckpointWeights
from reference_model.generate import generate
from reference_model.load import load_weights
from reference_model.model import CausalLM
from reference_model.multimodal import MultimodalLM, Pictures
from reference_model.positions import token_kinds
from tests.tolerances import tolerances

DEMO = Path(reference_model.__file__).parent / "demo"
WINDOW, COUNT = 256, 3
LIMITS = tolerances("reference_model")
DEMO_LIMITS = tolerances("demo")


@pytest.fixture(scope="module")
def windows() -> Tensor:
    """Two windows [WINDOW] from each of the first texts."""
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    rows = []
    for path in sorted((DEMO / "heldout").glob("*.txt"))[:COUNT]:
        ids = tokenizer.encode(path.read_text(encoding="utf-8")[: 20 * WINDOW]).ids
        rows += [ids[:WINDOW], ids[WINDOW : 2 * WINDOW]]
    return torch.tensor(rows)


def load(dtype: torch.dtype) -> CausalLM:
    with CheckpointWeights.open(DEMO) as source:
        with torch.device("meta"):
            model = CausalLM(source.config.text)
        load_weights(model, source, dtype)
    return model


@torch.no_grad()
def ours(ids: Tensor, dtype: torch.dtype) -> Tensor:
    logits: Tensor = load(dtype)(ids).logits
    return logits


@torch.no_grad()
def theirs(ids: Tensor, dtype: torch.dtype) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=dtype, experts_implementation="eager")
    logits: Tensor = model(ids).logits
    return logits


def kl(p: Tensor, q: Tensor) -> float:
    """Mean KL(p || q) of logits, in fp64."""
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def test_the_demo_in_bf16_and_fp32_equals_transformers(windows: Tensor) -> None:
    wide, half = theirs(windows, torch.float32), theirs(windows, torch.bfloat16)
    assert kl(half, ours(windows, torch.bfloat16)) <= kl(wide, half)
    difference = (ours(windows, torch.float32) - wide).abs().max() / wide.abs().max().clamp(min=1.0)
    assert float(difference) <= LIMITS["demo_fp32_to_upstream"]


@torch.no_grad()
def test_the_demo_sees_an_image_as_transformers_does(windows: Tensor) -> None:
    """Its tower is random: what counts is that the whole checkpoint is read, and every part of it used alike."""
    with CheckpointWeights.open(DEMO, vision=True) as source:
        with torch.device("meta"):
            model = MultimodalLM(source.config)
        load_weights(model, source, torch.float32)
    config, tower = model.model_config, model.visual
    tokens = [config.vision_start_token_id, *[config.image_token_id] * 6, config.vision_end_token_id]
    ids = torch.cat((windows[0, :50], torch.tensor(tokens), windows[0, 50:100]))[None]
    width = tower.patch_embed.proj.weight[0].numel()
    pixels = torch.randn(24, width, generator=torch.Generator().manual_seed(0))
    theirs = AutoModelForImageTextToText.from_pretrained(DEMO, dtype=torch.float32, experts_implementation="eager")
    expected = theirs(
        input_ids=ids,
        mm_token_type_ids=token_kinds(config, ids),
        pixel_values=pixels,
        image_grid_thw=torch.tensor([[1, 4, 6]]),
    ).logits
    got = model(ids, images=Pictures(pixels=pixels, grids=((1, 4, 6),))).logits
    assert float((got - expected).abs().max() / expected.abs().max()) <= LIMITS["demo_fp32_to_upstream"]


def test_the_demo_has_learned(windows: Tensor) -> None:
    logits = ours(windows, torch.float32)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
    assert float(loss) < DEMO_LIMITS["loss"]


def test_most_drafts_of_a_trained_head_are_right_and_change_nothing(windows: Tensor) -> None:
    """One token at a time, as the head was trained."""
    model, prompts = load(torch.float64), windows[::2, :50]
    plain = generate(model, prompts, max_new_tokens=40, stop_ids=())
    drafted = generate(model, prompts, max_new_tokens=40, stop_ids=(), draft=1)
    assert torch.equal(drafted.tokens, plain.tokens)
    assert drafted.acceptance_rate > DEMO_LIMITS["acceptance_rate"]
