"""Lanes side by side give what each gives alone, and what they have in common is computed once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from reference_model.cache import LayerCache
from reference_model.each import Each, one_by_one
from reference_model.layer import DecoderLayer
from reference_model.layer_pass import ROWS_BYTES, Batch, InputRounding, Lane, LayerRecord, pass_layer
from reference_model.load import TensorDictSource
from tests.reference_model import tiny

CONFIG = tiny.text_config()
BATCHES = [Batch(ids=tiny.tokens(2, 70)), Batch(ids=tiny.tokens(1, 33, seed=1))]
INPUTS = [
    torch.randn(*batch.ids.shape, 96, generator=torch.Generator().manual_seed(n)) for n, batch in enumerate(BATCHES)
]
OTHERS = [2 * x + 1 for x in INPUTS]


def changed(part: str) -> TensorDictSource:
    """The model with other weights where names of layer 0 contain ``part``."""
    tensors = dict(tiny.source(tiny.checkpoint()).tensors)
    for name, tensor in tensors.items():
        if part in name and name.startswith("layers.0."):
            tensors[name] = 1.5 * tensor
    return TensorDictSource(tensors)


PLAIN = tiny.source(tiny.checkpoint())
EXPERTS, MIXER = changed("mlp.experts."), changed("linear_attn.in_proj_z")


def coarse(x: Tensor) -> Tensor:
    return (8 * x).round() / 8


def round_experts(name: str) -> Callable[[Tensor], Tensor] | None:
    return coarse if ".experts." in name else None


def round_all(name: str) -> Callable[[Tensor], Tensor] | None:
    return coarse


class Seen:
    """A lane and what it was given."""

    def __init__(
        self,
        inputs: Sequence[Tensor],
        source: TensorDictSource = PLAIN,
        rounding: InputRounding | None = None,
        marks: int = 0,
        **more: object,
    ) -> None:
        self.records: list[LayerRecord] = []
        self.states: list[Tensor] = []
        lane = Lane(
            take=lambda b: inputs[b].clone(), give=self.records.append, experts=source, config=CONFIG, marks=marks,
            give_states=lambda b, states: self.states.append(states),
        )  # fmt: skip
        if rounding is not None:
            lane = replace(lane, rounding=rounding)
        self.lane = replace(lane, **more)  # type: ignore[arg-type]  # fields of any type


def run(*seen: Seen, rows_bytes: int = ROWS_BYTES, each: Each = one_by_one) -> None:
    lanes = [one.lane for one in seen]
    pass_layer(CONFIG, PLAIN, 0, BATCHES, lanes, torch.float32, rows_bytes=rows_bytes, each=each)


def same(one: Seen, other: Seen) -> bool:
    pairs = zip(one.records, other.records, strict=True)
    return (
        all(
            (a.batch, a.layer) == (b.batch, b.layer)
            and torch.equal(a.hidden, b.hidden)
            and torch.equal(a.routing.experts, b.routing.experts)
            for a, b in pairs
        )
        and len(one.states) == len(other.states)
        and all(torch.equal(a, b) for a, b in zip(one.states, other.states, strict=True))
    )


def lanes() -> list[Seen]:
    return [
        Seen(INPUTS, marks=3),
        Seen(INPUTS, EXPERTS, marks=3),
        Seen(INPUTS, EXPERTS, round_experts, marks=3),
        Seen(INPUTS, EXPERTS, round_all, marks=3),
        Seen(INPUTS, MIXER, marks=3),
        Seen(OTHERS, EXPERTS, round_experts, marks=3),
        Seen(INPUTS, EXPERTS, round_experts),
    ]


@pytest.mark.parametrize("rows_bytes", [0, 200_000, ROWS_BYTES])
def test_each_lane_gives_what_it_gives_alone(rows_bytes: int) -> None:
    together, alone = lanes(), lanes()
    run(*together, rows_bytes=rows_bytes)
    for one in alone:
        run(one)
    assert [same(one, other) for one, other in zip(together, alone, strict=True)] == [True] * len(alone)
    assert [len(one.states) for one in together] == [2, 2, 2, 2, 2, 2, 0]
    distinct = {one.records[0].hidden.sum().item() for one in together}
    assert len(distinct) == len(together) - 1  # the last differs from another in its marks alone


def test_threads_change_nothing() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ordered, side_by_side = lanes(), lanes()
        run(*ordered)
        with ThreadPoolExecutor(3) as pool:
            run(*side_by_side, each=pool.map)
    finally:
        torch.set_num_threads(before)
    assert all(same(one, other) for one, other in zip(ordered, side_by_side, strict=True))


@pytest.fixture
def mixes(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The inputs that layers have mixed."""
    found: list[Tensor] = []
    mix = DecoderLayer.mix

    def watched(layer: DecoderLayer, x: Tensor, *rest: object) -> object:
        found.append(x)
        return mix(layer, x, *rest)  # type: ignore[arg-type]  # handed on as they come

    monkeypatch.setattr(DecoderLayer, "mix", watched)
    return found


def test_what_is_the_same_before_the_experts_is_mixed_once(mixes: list[Tensor]) -> None:
    run(Seen(INPUTS), Seen(INPUTS, EXPERTS), Seen(INPUTS, EXPERTS, round_experts), Seen(OTHERS))
    assert len(mixes) == 2 * len(BATCHES)


@pytest.mark.parametrize(
    "other",
    [
        Seen(OTHERS),
        Seen(INPUTS, MIXER),
        Seen(INPUTS, rounding=round_all),
        Seen(INPUTS, marks=2),
        Seen(INPUTS, config=replace(CONFIG, num_experts_per_tok=2)),
        Seen(INPUTS, past=lambda b: None),
        Seen(INPUTS, give_cache=lambda b, cache: None),
    ],
    ids=["inputs", "weights", "rounding", "marks", "config", "past", "cache"],
)
def test_what_is_not_is_mixed_alone(other: Seen, mixes: list[Tensor]) -> None:
    run(Seen(INPUTS), other)
    assert len(mixes) == 2 * len(BATCHES)


def test_the_same_lane_twice_passes_the_experts_once() -> None:
    rows = 0

    def count(x: Tensor) -> Tensor:
        nonlocal rows
        rows += len(x)
        return x

    def rounding(name: str) -> Callable[[Tensor], Tensor] | None:
        return count if name.endswith("experts.0.down_proj") else None

    first, second = Seen(INPUTS, EXPERTS, rounding), Seen(INPUTS, EXPERTS, rounding)
    run(first, second)
    visits = sum(int((record.routing.experts == 0).sum()) for record in first.records)
    assert rows == visits > 0
    assert same(first, second)


def test_a_rounding_that_all_experts_share_sees_each_token_once() -> None:
    rows: dict[str, int] = {"shared": 0, "own": 0}

    def shared(x: Tensor) -> Tensor:
        rows["shared"] += len(x)
        return coarse(x)

    def own(x: Tensor) -> Tensor:
        rows["own"] += len(x)
        return coarse(x)

    one = Seen(INPUTS, EXPERTS, lambda name: shared if name.endswith("gate_up_proj") else None)
    other = Seen(INPUTS, EXPERTS, lambda name: (lambda x: own(x)) if name.endswith("gate_up_proj") else None)
    run(one)
    run(other)
    tokens = sum(batch.ids.numel() for batch in BATCHES)
    assert rows == {"shared": tokens, "own": CONFIG.num_experts_per_tok * tokens}
    assert same(one, other)


def test_caches_of_two_lanes_are_given_to_both() -> None:
    caches: list[list[LayerCache]] = [[], []]
    run(*(Seen(INPUTS, give_cache=lambda b, cache, to=to: to.append(cache)) for to in caches))
    assert [len(one) for one in caches] == [len(BATCHES)] * 2
