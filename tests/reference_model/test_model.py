"""The decoder equals transformers and a textbook model, whole and layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from reference_model.attention import AttentionKind
from reference_model.draft import draft_tokens
from reference_model.generate import generate
from reference_model.model import CausalLM
from tests.reference_model import textbook, tiny, upstream
from tests.tolerances import tolerances

LIMITS = tolerances("reference_model")
LENGTHS = (1, 2, 63, 64, 65, 200)


def worst(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference relative to the largest value, or to 1 if that is larger."""
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1.0))


def kl(p: Tensor, q: Tensor) -> float:
    """Mean KL(p || q) of log probabilities."""
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return tiny.checkpoint()


@pytest.fixture(scope="module")
def ours(tensors: dict[str, Tensor]) -> CausalLM:
    return tiny.model(tensors)


@pytest.fixture(scope="module")
def ours_fp64(tensors: dict[str, Tensor]) -> CausalLM:
    return tiny.model(tensors, torch.float64)


@pytest.fixture(scope="module")
def theirs(tensors: dict[str, Tensor]) -> Any:
    return upstream.build(tiny.config_json(), tensors)


@pytest.fixture(scope="module")
def theirs_fp64(tensors: dict[str, Tensor]) -> Any:
    return upstream.build(tiny.config_json(), tensors, torch.float64)


@pytest.mark.parametrize("length", LENGTHS)
def test_fp32_logits_equal_those_of_transformers(ours: CausalLM, theirs: Any, length: int) -> None:
    ids = tiny.tokens(2, length, seed=length)
    assert worst(ours(ids).logits, theirs(ids).logits) <= LIMITS["fp32_to_upstream"]


@pytest.mark.parametrize("length", LENGTHS)
def test_fp64_logits_equal_those_of_transformers_without_its_casts(
    ours_fp64: CausalLM, theirs_fp64: Any, length: int
) -> None:
    ids = tiny.tokens(2, length, seed=length)
    with upstream.LiftedCasts():
        expected = theirs_fp64(ids).logits
    assert expected.dtype == torch.float64
    assert worst(ours_fp64(ids).logits, expected) <= LIMITS["fp64_to_upstream"]


@pytest.mark.parametrize("length", LENGTHS)
def test_fp64_logits_equal_those_of_the_textbook(ours_fp64: CausalLM, tensors: dict[str, Tensor], length: int) -> None:
    ids = tiny.tokens(1, length, seed=length)
    expected = textbook.logits(tiny.config_json(), tensors, ids[0].tolist(), [(t, t, t) for t in range(length)])
    assert worst(ours_fp64(ids).logits[0], expected) <= LIMITS["fp64_to_textbook"]


@pytest.mark.parametrize("changes", [
    {"layer_types": ["full_attention", "linear_attention", "linear_attention", "full_attention"]},
    {"linear_conv_kernel_dim": 3, "linear_num_value_heads": 2, "num_experts_per_tok": 1},
    {"num_key_value_heads": 6, "num_experts_per_tok": 7, "linear_conv_kernel_dim": 2, "rms_norm_eps": 1e-3},
])  # fmt: skip
def test_other_patterns_and_sizes_equal_the_textbook_too(changes: dict[str, Any]) -> None:
    tensors = tiny.checkpoint(seed=1, **changes)
    ids = tiny.tokens(1, 70)
    expected = textbook.logits(tiny.config_json(**changes), tensors, ids[0].tolist(), [(t, t, t) for t in range(70)])
    assert worst(tiny.model(tensors, torch.float64, **changes)(ids).logits[0], expected) <= LIMITS["fp64_to_textbook"]


def test_every_layer_equals_that_of_transformers(ours_fp64: CausalLM, theirs_fp64: Any) -> None:
    ids = tiny.tokens(2, 70)
    with upstream.LiftedCasts():
        expected = theirs_fp64(ids, output_hidden_states=True, output_router_logits=True)
    got = ours_fp64(ids, keep_hidden_states=True)
    assert got.hidden_states is not None
    assert len(got.hidden_states) == 5
    for mine, other in zip(got.hidden_states[:-1], expected.hidden_states, strict=False):
        assert worst(mine, other) <= LIMITS["fp64_to_upstream"]
    assert worst(got.hidden, expected.hidden_states[-1]) <= LIMITS["fp64_to_upstream"]
    for mine, other in zip(got.router_logits, expected.router_logits, strict=True):
        assert worst(mine, other) <= LIMITS["fp64_to_upstream"]


def test_zero_vectors_stay_finite_and_equal(tensors: dict[str, Tensor]) -> None:
    """A zero embedding makes zero hidden states; zero rows of in_proj_qkv make zero queries and keys."""
    zeroed = {name: tensor.clone() for name, tensor in tensors.items()}
    zeroed["model.embed_tokens.weight"][:200] = 0
    heads = slice(0, 2 * tiny.text_config().key_dim)
    zeroed["model.layers.0.linear_attn.in_proj_qkv.weight"][heads] = 0
    zeroed["model.layers.1.self_attn.k_proj.weight"].zero_()
    ids = tiny.tokens(2, 65)
    ids[0] = ids[0] % 200
    theirs = upstream.build(tiny.config_json(), zeroed, torch.float64)
    with upstream.LiftedCasts():
        expected = theirs(ids).logits
    got = tiny.model(zeroed, torch.float64)(ids).logits
    assert bool(got.isfinite().all())
    assert worst(got, expected) <= LIMITS["fp64_to_upstream"]
    nothing = {name: tensor * 0 for name, tensor in tensors.items()}
    assert not tiny.model(nothing)(ids).logits.any()


@pytest.mark.parametrize("cuts", [(1,), (64,), (3, 4), (63, 65, 66), tuple(range(60, 70))])
def test_a_sequence_in_parts_gives_what_it_gives_whole(ours_fp64: CausalLM, cuts: tuple[int, ...]) -> None:
    ids = tiny.tokens(2, 70)
    whole = ours_fp64(ids)
    cache, parts = None, []
    for piece in ids.tensor_split(cuts, dim=1):
        output = ours_fp64(piece, cache=cache)
        cache = output.cache
        parts.append(output.logits)
    assert worst(torch.cat(parts, dim=1), whole.logits) <= LIMITS["fp64_split"]
    assert cache is not None
    assert cache.lengths.tolist() == [70, 70]


def test_a_forward_leaves_the_cache_that_it_was_given_alone(ours_fp64: CausalLM) -> None:
    ids = tiny.tokens(1, 9)
    cache = ours_fp64(ids[:, :4]).cache
    first = ours_fp64(ids[:, 4:], cache=cache).logits
    assert torch.equal(first, ours_fp64(ids[:, 4:], cache=cache).logits)


def test_only_the_last_logits_on_request(ours: CausalLM) -> None:
    ids = tiny.tokens(2, 9)
    assert worst(ours(ids, last_logits_only=True).logits, ours(ids).logits[:, -1:]) <= LIMITS["fp32_to_upstream"]


@pytest.mark.parametrize("kind", ["sdpa", "plain"])
def test_both_ways_of_attending_agree(tensors: dict[str, Tensor], ours_fp64: CausalLM, kind: AttentionKind) -> None:
    ids = tiny.tokens(2, 33)
    other = tiny.model(tensors, torch.float64, kind)
    cache = other(ids[:, :20]).cache
    assert worst(other(ids).logits, ours_fp64(ids).logits) <= LIMITS["fp64_split"]
    assert worst(other(ids[:, 20:], cache=cache).logits, ours_fp64(ids).logits[:, 20:]) <= LIMITS["fp64_split"]


def test_positions_of_three_axes_equal_the_textbook_and_transformers(
    ours_fp64: CausalLM, theirs_fp64: Any, tensors: dict[str, Tensor]
) -> None:
    positions = torch.randint(0, 50, (3, 1, 12), generator=torch.Generator().manual_seed(0))
    ids = tiny.tokens(1, 12)
    got = ours_fp64(ids, position_ids=positions).logits
    triples = [(int(t), int(h), int(w)) for t, h, w in positions[:, 0].T]
    expected = textbook.logits(tiny.config_json(), tensors, ids[0].tolist(), triples)
    assert worst(got[0], expected) <= LIMITS["fp64_to_textbook"]
    with upstream.LiftedCasts():
        expected = theirs_fp64(ids, position_ids=positions).logits
    assert worst(got, expected) <= LIMITS["fp64_to_upstream"]


@pytest.mark.parametrize("seed", [0, 1])
def test_bf16_is_no_further_from_transformers_than_its_rounding(seed: int) -> None:
    """Mean KL of the two BF16 models, against that of transformers in BF16 to itself in fp32."""
    stored = {name: tensor.bfloat16().float() for name, tensor in tiny.checkpoint(seed).items()}
    ids = tiny.tokens(4, 100, seed)
    wide, half = (
        upstream.build(tiny.config_json(), stored, dtype)(ids).logits.float().log_softmax(-1)
        for dtype in (torch.float32, torch.bfloat16)
    )
    ours = tiny.model(stored, torch.bfloat16)(ids).logits.float().log_softmax(-1)
    assert kl(half, ours) <= kl(wide, half)


def test_a_tied_head_is_the_embedding(tensors: dict[str, Tensor]) -> None:
    untied = {name: tensor.clone() for name, tensor in tensors.items()}
    untied["lm_head.weight"] = untied["model.embed_tokens.weight"].clone()
    tied = {name: tensor for name, tensor in untied.items() if name != "lm_head.weight"}
    ids = tiny.tokens(1, 5)
    assert torch.equal(tiny.model(tied, tie_word_embeddings=True)(ids).logits, tiny.model(untied)(ids).logits)


def test_the_prediction_head_equals_the_textbook(ours_fp64: CausalLM, tensors: dict[str, Tensor]) -> None:
    ids = tiny.tokens(1, 12)
    triples = [(t, t, t) for t in range(12)]
    states = textbook.hidden(tiny.config_json(), tensors, ids[0].tolist(), triples)
    expected = textbook.draft_logits(tiny.config_json(), tensors, states[:-1], ids[0, 1:].tolist(), triples[:-1])
    output = ours_fp64(ids)
    drafted = ours_fp64.draft(output.hidden[:, :-1], ids[:, 1:])
    assert worst(ours_fp64.head(drafted.hidden)[0], expected) <= LIMITS["fp64_to_textbook"]
    first = ours_fp64.draft(output.hidden[:, :5], ids[:, 1:6])
    rest = ours_fp64.draft(output.hidden[:, 5:-1], ids[:, 6:], cache=first.cache)
    assert worst(rest.hidden, drafted.hidden[:, 5:]) <= LIMITS["fp64_split"]


def test_a_model_in_fp64_has_no_narrower_step(ours_fp64: CausalLM, ours: CausalLM) -> None:
    """Were anything but the angles fp32, fp64 would be as far from the textbook as fp32 is; states tell it directly."""
    output = ours_fp64(tiny.tokens(1, 3))
    for layer in output.cache.layers:
        tensors = [getattr(layer, name) for name in layer.__slots__]
        assert all(tensor.dtype == torch.float64 for tensor in tensors if tensor is not None)
    half = tiny.model(tiny.checkpoint(), torch.bfloat16)(tiny.tokens(1, 3))
    assert half.logits.dtype == torch.bfloat16
    assert half.cache.layers[0].recurrent.dtype == torch.float32


def test_inputs_that_do_not_fit_are_errors_that_name_the_cause() -> None:
    model, ids = tiny.model(tiny.checkpoint()), tiny.tokens(2, 5)
    headless = tiny.model(
        {name: t for name, t in tiny.checkpoint().items() if not name.startswith("mtp.")}, mtp_num_hidden_layers=0
    )
    hidden, cache = torch.zeros(2, 5, 96), model(ids).cache
    faults: list[tuple[Callable[[], object], str]] = [
        (lambda: model(ids[:, :0]), "2 rows of 0 tokens: expected at least one"),
        (lambda: model(ids[:0]), "0 rows of 5 tokens: expected at least one"),
        (lambda: model(ids[0]), r"token ids are torch.int64 \[5\], expected whole numbers \[rows, tokens\]"),
        (lambda: model(ids.float()), r"token ids are torch.float32 \[2, 5\]"),
        (lambda: model(ids.bool()), r"token ids are torch.bool \[2, 5\], expected whole numbers"),
        (lambda: model(ids.short()), r"expected whole numbers \[rows, tokens\] of 32 or 64 bits"),
        (lambda: model(ids - 500), "is not of the vocabulary, 0 to 415"),
        (lambda: model(ids, embeddings=hidden.double()), "embeddings is torch.float64, but the model computes in"),
        (lambda: model(ids, position_ids=torch.zeros(3, 2, 5)), "position_ids is torch.float32"),
        (lambda: model(ids, attention_mask=torch.zeros(2, 5) - 1e9), r"attention_mask holds -1e\+?0?9|-1000000000"),
        (lambda: model(ids, cache=model.draft(hidden, ids).cache), "the cache has 1 layers, expected 4"),
        (lambda: model.draft(hidden, ids, cache=cache), "the cache has 4 layers, expected 1"),
        (lambda: model.draft(hidden.double(), ids), "hidden is torch.float64, but the model computes in"),
        (lambda: draft_tokens(model, hidden, ids, 0), "count is 0, expected at least one"),
        (lambda: cache.rewind(torch.tensor([5])), r"lengths is \[5\], expected one count for each of 2 rows"),
        (lambda: cache.rewind(torch.tensor([5, -1])), "expected one count for each"),
        (lambda: CausalLM(model.config, "flash"), "attention is 'flash', expected one of sdpa, plain"),
        (lambda: tiny.model(tiny.checkpoint(), torch.int8), "cannot compute in torch.int8"),
        (lambda: generate(model, ids, max_new_tokens=-1), "max_new_tokens is -1"),
        (
            lambda: generate(model, ids, max_new_tokens=1, attention_mask=torch.tensor([[1] * 5, [0] * 5])),
            "leaves a prompt without tokens",
        ),
        (lambda: model(ids, embeddings=hidden[:, :4]), r"embeddings is \[2, 4, 96\], expected \[2, 5, 96\]"),
        (
            lambda: model(ids, position_ids=ids),
            r"position_ids is torch.int64 \[2, 5\], expected torch.int64 \[3, 2, 5\]",
        ),
        (lambda: model(ids[:1], cache=cache), "the cache is of a batch of 2 rows, the new tokens are of 1"),
        (lambda: model.draft(hidden[:, :4], ids), r"hidden is \[2, 4, 96\], expected \[2, 5, 96\]"),
        (lambda: model.draft(hidden, ids[0]), r"token ids are torch.int64 \[5\]"),
        (lambda: headless.draft(hidden, ids), "no prediction head to draft with: mtp_num_hidden_layers is 0"),
        (lambda: generate(model, ids[:, :0], max_new_tokens=1), "2 rows of 0 tokens"),
    ]
    for run, words in faults:
        with pytest.raises(ValueError, match=words):
            run()
