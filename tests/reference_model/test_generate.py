"""Generation: greedy is the argmax of full forwards, sampling follows its distribution."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reference_model.generate import Sampling, generate, token_probabilities
from reference_model.model import CausalLM
from tests.reference_model import tiny
from tests.reference_model.test_padding import padded


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return tiny.model(tiny.checkpoint(), torch.float64)


def test_greedy_tokens_are_those_of_full_forwards(model: CausalLM) -> None:
    ids = tiny.tokens(2, 5)
    expected = ids
    for _ in range(8):
        expected = torch.cat((expected, model(expected).logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(generate(model, ids, max_new_tokens=8, stop_ids=()).tokens, expected)


def test_generation_stops_at_a_stop_token(model: CausalLM) -> None:
    ids = tiny.tokens(2, 5)
    free = generate(model, ids, max_new_tokens=8, stop_ids=()).tokens
    stop = int(free[0, 6])
    stopped = generate(model, ids, max_new_tokens=8, stop_ids=(stop,)).tokens
    first = free[0].tolist().index(stop, 5)
    assert stopped[0, : first + 1].tolist() == free[0, : first + 1].tolist()
    assert set(stopped[0, first:].tolist()) == {stop}
    alone = generate(model, ids[:1], max_new_tokens=8, stop_ids=(stop,)).tokens
    assert alone.shape[1] == first + 1


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("sampling", [None, Sampling(top_k=1, temperature=3.0)])
def test_padded_prompts_go_on_as_they_do_alone(model: CausalLM, side: str, sampling: Sampling | None) -> None:
    rows = [tiny.tokens(1, length, seed=length)[0] for length in (3, 66, 70, 1)]
    batch = padded(rows, side)
    together = generate(
        model, batch.ids, attention_mask=batch.mask, max_new_tokens=6, stop_ids=(), sampling=sampling
    ).tokens
    assert torch.equal(together[:, :-6], batch.ids)
    for row, got in zip(rows, together, strict=True):
        assert torch.equal(got[-6:], generate(model, row[None], max_new_tokens=6, stop_ids=()).tokens[0, -6:])


def test_embeddings_and_positions_of_a_prompt_count_as_in_a_forward(model: CausalLM) -> None:
    ids, positions = tiny.tokens(1, 5), torch.tensor([0, 1, 1, 1, 2]).expand(3, 1, 5)
    embeddings = model.embed_tokens(ids) * 1.5
    expected: list[Tensor] = []
    output = model(ids, embeddings=embeddings, position_ids=positions)
    for step in range(4):
        expected.append(output.logits[:, -1:].argmax(-1))
        output = model(expected[-1], position_ids=torch.full((3, 1, 1), 3 + step), cache=output.cache)
    for draft in (0, 2):
        got = generate(
            model, ids, max_new_tokens=4, embeddings=embeddings, position_ids=positions, stop_ids=(), draft=draft
        )
        assert torch.equal(got.tokens[:, 5:], torch.cat(expected, dim=1))


def test_no_new_tokens_is_the_prompt(model: CausalLM) -> None:
    assert torch.equal(generate(model, tiny.tokens(2, 5), max_new_tokens=0).tokens, tiny.tokens(2, 5))


def test_a_seed_repeats_and_another_differs(model: CausalLM) -> None:
    def draw(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        out = generate(
            model, tiny.tokens(1, 5), max_new_tokens=12, sampling=Sampling(temperature=2.0), generator=generator
        )
        return [int(t) for t in out.tokens[0]]

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)


def test_a_low_temperature_or_one_candidate_is_greedy(model: CausalLM) -> None:
    ids = tiny.tokens(2, 5)
    greedy = generate(model, ids, max_new_tokens=6).tokens
    for sampling in (Sampling(temperature=1e-6), Sampling(top_k=1), Sampling(top_p=1e-9)):
        assert torch.equal(generate(model, ids, max_new_tokens=6, sampling=sampling).tokens, greedy)


@given(temperature=st.floats(0.1, 5), top_k=st.integers(0, 12), top_p=st.floats(0.01, 1), seed=st.integers(0, 99))
def test_probabilities_keep_what_the_options_say(temperature: float, top_k: int, top_p: float, seed: int) -> None:
    logits = torch.randn(3, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    got = token_probabilities(logits, Sampling(temperature=temperature, top_k=top_k, top_p=top_p))
    for row, kept in zip((logits / temperature).softmax(-1).tolist(), got.tolist(), strict=True):
        ranked = sorted(range(9), key=lambda i: -row[i])[: top_k or 9]
        mass, expected = 0.0, []
        for token in ranked:
            if mass >= top_p * sum(row[i] for i in ranked) - 1e-12 and expected:
                break
            expected.append(token)
            mass += row[token]
        total = sum(row[i] for i in expected)
        assert kept == pytest.approx([row[i] / total if i in expected else 0.0 for i in range(9)], abs=1e-9)


@pytest.mark.parametrize("bad", [{"temperature": 0.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_options_without_meaning_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="sampling needs"):
        Sampling(**bad)  # type: ignore[arg-type]
