"""Drafting: the head equals one made of transformers' layers, and drafted tokens are those chosen without drafts."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import Qwen3_5MoeTextConfig
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as theirs

from qconvert.weights.source import CheckpointWeights
from reference_model.draft import draft_tokens, following, judge
from reference_model.generate import Sampling, generate
from reference_model.load import load_weights
from reference_model.model import CausalLM
from tests.checkpoints import Layout, make_tiny
from tests.reference_model import tiny, upstream
from tests.reference_model.test_model import worst
from tests.reference_model.test_padding import Piece, padded
from tests.tolerances import tolerances

LIMITS = tolerances("reference_model")

FEW = 5
"""So small a vocabulary that guesses without skill are often right."""

MODELS = {
    dtype: tiny.model(tiny.checkpoint(seed=3, vocab_size=FEW), dtype, vocab_size=FEW)
    for dtype in (torch.float32, torch.float64)
}
EXACT = MODELS[torch.float64]


def prompts(*lengths: int, seed: int = 0) -> list[Tensor]:
    return [tiny.tokens(1, length, seed + 10 * b)[0] % FEW for b, length in enumerate(lengths)]


def batch_of(rows: list[Tensor], side: str) -> Piece:
    batch = padded(rows, side)
    return Piece(ids=batch.ids % FEW, mask=batch.mask)


class AssembledHead(nn.Module):
    """The prediction head out of transformers' own layers; no cache: every call runs the whole sequence."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        config = Qwen3_5MoeTextConfig(**tiny.config_json(num_hidden_layers=1, layer_types=["full_attention"]))
        config._attn_implementation = config._experts_implementation = "eager"
        width = config.hidden_size
        self.fc = nn.Linear(2 * width, width, bias=False)
        norms: list[Any] = [theirs.Qwen3_5MoeRMSNorm(width, eps=config.rms_norm_eps) for _ in range(3)]
        self.pre_fc_norm_embedding, self.pre_fc_norm_hidden, self.norm = norms
        self.layers = nn.ModuleList([theirs.Qwen3_5MoeDecoderLayer(config, 0)])
        self.load_state_dict({n.removeprefix("mtp."): t for n, t in tensors.items() if n.startswith("mtp.")})
        self.embedding, self.head = tensors["model.embed_tokens.weight"].double(), tensors["lm_head.weight"].double()
        self.double().eval().requires_grad_(False)
        self.rotary = theirs.Qwen3_5MoeTextRotaryEmbedding(config)

    def forward(self, hidden: Tensor, next_ids: Tensor) -> Tensor:
        tokens = next_ids.shape[1]
        embeddings = self.pre_fc_norm_embedding(self.embedding[next_ids])
        x = self.fc(torch.cat([embeddings, self.pre_fc_norm_hidden(hidden)], dim=-1))
        future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        mask = torch.zeros(1, 1, tokens, tokens, dtype=torch.float64).masked_fill(future, -1e300)
        turned = self.rotary(x, torch.arange(tokens).expand(3, len(x), tokens))
        out: Tensor = self.norm(self.layers[0](x, position_embeddings=turned, attention_mask=mask))
        return out


def test_drafts_equal_those_of_a_head_of_transformers_layers() -> None:
    tensors = tiny.checkpoint()
    model, other = tiny.model(tensors, torch.float64), AssembledHead(tensors)
    ids = tiny.tokens(2, 20)
    hidden = model(ids).hidden[:, :-1]
    drafts = draft_tokens(model, hidden, ids[:, 1:], 4)
    states, following_ids = hidden, ids[:, 1:]
    for step in range(4):
        with upstream.LiftedCasts():
            states_after = other(states, following_ids)
        logits = states_after[:, -1] @ other.head.T
        assert worst(drafts.hidden[:, step], states_after[:, -1]) <= LIMITS["fp64_to_upstream"]
        assert worst(drafts.logits[:, step], logits) <= LIMITS["fp64_to_upstream"]
        assert torch.equal(drafts.tokens[:, step], logits.argmax(-1))
        states = torch.cat((states, states_after[:, -1:]), dim=1)
        following_ids = torch.cat((following_ids, drafts.tokens[:, step : step + 1]), dim=1)
    assert drafts.cache.lengths.tolist() == [19, 19]


def test_the_head_loads_from_either_layout(tmp_path: Path) -> None:
    layouts: tuple[Layout, ...] = ("fused", "per-expert")
    ids, logits = tiny.tokens(1, 9), []
    for layout in layouts:
        make_tiny(tmp_path / layout, layout=layout)
        with CheckpointWeights.open(tmp_path / layout) as source:
            with torch.device("meta"):
                model = CausalLM(source.config.text)
            load_weights(model, source, torch.float32)
        logits.append(draft_tokens(model, model(ids).hidden[:, :-1], ids[:, 1:], 3).logits)
    assert logits[0].shape == (1, 3, 416)
    assert torch.equal(*logits)


@cache
def alone(length: int) -> tuple[Tensor, list[int]]:
    """A prompt and its continuation."""
    (prompt,) = prompts(length, seed=length)
    return prompt, generate(EXACT, prompt[None], max_new_tokens=30, stop_ids=()).tokens[0, length:].tolist()


@settings(max_examples=30)
@given(st.data())
def test_whatever_is_drafted_the_model_has_its_way(data: st.DataObject) -> None:
    """Drafts are the right continuation with random faults, so that every number of them is accepted now and then."""
    lengths = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    batch = batch_of([alone(length)[0] for length in lengths], data.draw(st.sampled_from(["left", "right"])))
    right = [alone(length)[1] for length in lengths]
    output = EXACT(batch.ids, attention_mask=batch.mask, last_logits_only=True)
    pending, state = output.logits.argmax(-1), output.cache
    rows = [[int(token)] for token in pending]
    for _ in range(data.draw(st.integers(1, 5))):
        count = data.draw(st.integers(0, 4))
        faults = [data.draw(st.lists(st.booleans(), min_size=count, max_size=count)) for _ in rows]
        drafts = [
            [(right[b][len(row) + i] + fault) % FEW for i, fault in enumerate(faults[b])] for b, row in enumerate(rows)
        ]
        judged = judge(EXACT, pending, torch.tensor(drafts, dtype=torch.int64).view(len(rows), count), state)
        accepted = [[*wrong, True].index(True) for wrong in faults]
        assert judged.accepted.tolist() == accepted
        assert judged.kept.sum(1).tolist() == [n + 1 for n in accepted]
        for row, chosen, n in zip(rows, judged.chosen.tolist(), accepted, strict=True):
            row.extend(chosen[: n + 1])
        assert rows == [tokens[: len(row)] for row, tokens in zip(rows, right, strict=True)]
        pending, state = judged.chosen.gather(1, judged.accepted[:, None]), judged.cache
        assert state.lengths.tolist() == [n + len(row) - 1 for n, row in zip(lengths, rows, strict=True)]


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    side=st.sampled_from(["left", "right"]),
    draft=st.integers(1, 4),
    limit=st.integers(1, 25),
    stop=st.one_of(st.none(), st.integers(0, FEW - 1)),
    seed=st.integers(0, 3),
)
def test_drafted_tokens_are_the_plain_ones_in_fp64(
    lengths: list[int], side: str, draft: int, limit: int, stop: int | None, seed: int
) -> None:
    batch = batch_of(prompts(*lengths, seed=seed), side)
    stops = () if stop is None else (stop,)

    def run(k: int) -> Any:
        return generate(EXACT, batch.ids, attention_mask=batch.mask, max_new_tokens=limit, stop_ids=stops, draft=k)

    got = run(draft)
    assert torch.equal(got.tokens, run(0).tokens)
    assert 0 <= got.accepted <= got.drafted


@pytest.mark.parametrize("draft", [1, 3])
def test_drafted_tokens_in_fp32_differ_only_where_two_are_as_good(draft: int) -> None:
    model = MODELS[torch.float32]
    ids = torch.stack(prompts(8, 8, 8, 8))
    plain = generate(model, ids, max_new_tokens=60, stop_ids=()).tokens
    drafted = generate(model, ids, max_new_tokens=60, stop_ids=(), draft=draft).tokens
    best = model(plain).logits.topk(2).values
    gaps = best[..., 0] - best[..., 1]
    for a, b, gap in zip(plain, drafted, gaps, strict=True):
        differing = (a != b).nonzero().flatten()
        assert len(differing) == 0 or gap[differing[0] - 1] < LIMITS["as_good"]


@pytest.mark.parametrize("draft", [1, 2, 5])
def test_as_many_drafts_are_accepted_as_without_any_cache(draft: int) -> None:
    """Acceptance alone shows whether the head was told the right states: wrong ones would still give right tokens."""
    ids, limit = prompts(7, seed=1)[0][None], 50
    got = generate(EXACT, ids, max_new_tokens=limit, stop_ids=(), draft=draft)
    right = generate(EXACT, ids, max_new_tokens=limit + draft, stop_ids=()).tokens[0, 7:].tolist()
    known, drafted, accepted = 1, 0, 0
    while known < limit:
        sequence = torch.tensor([ids[0].tolist() + right[:known]])
        count = min(draft, limit - known - 1)
        states, next_ids = EXACT(sequence[:, :-1]).hidden, sequence[:, 1:]
        guesses = []
        for _ in range(count):
            after = EXACT.draft(states, next_ids).hidden[:, -1:]
            guesses.append(int(EXACT.head(after).argmax()))
            states = torch.cat((states, after), dim=1)
            next_ids = torch.cat((next_ids, torch.tensor([guesses[-1:]])), dim=1)
        wrong = [guess != token for guess, token in zip(guesses, right[known:], strict=False)]
        drafted, accepted = drafted + count, accepted + [*wrong, True].index(True)
        known += [*wrong, True].index(True) + 1
    assert (got.drafted, got.accepted) == (drafted, accepted)
    assert 0 < got.acceptance_rate == accepted / drafted < 1


def test_what_follows_knows_padding() -> None:
    ids = torch.tensor([[7, 1, 2, 3], [4, 5, 8, 9], [1, 2, 3, 4]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 1]])
    last = torch.tensor([[60], [61], [62]])
    got = following(ids, last, mask)
    assert [row[real.bool()].tolist() for row, real in zip(got, mask, strict=True)] == [[2, 3, 60], [5, 61], [3, 4, 62]]
    assert following(ids, last).tolist() == [[1, 2, 3, 60], [5, 8, 9, 61], [2, 3, 4, 62]]


def test_plain_generation_drafts_nothing() -> None:
    got = generate(EXACT, tiny.tokens(1, 3) % FEW, max_new_tokens=4)
    assert (got.drafted, got.accepted) == (0, 0)
    assert got.acceptance_rate != got.acceptance_rate


def test_drafting_without_a_head_or_with_sampling_is_an_error() -> None:
    headless = CausalLM(tiny.text_config(vocab_size=FEW, mtp_num_hidden_layers=0))
    faults: list[tuple[CausalLM, dict[str, Any]]] = [
        (headless, {"draft": 1}),
        (EXACT, {"draft": 1, "sampling": Sampling()}),
        (EXACT, {"draft": -1}),
    ]
    for model, options in faults:
        with pytest.raises(ValueError, match="drafting needs a prediction head"):
            generate(model, tiny.tokens(1, 3) % FEW, max_new_tokens=4, **options)
