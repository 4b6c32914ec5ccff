"""How long two models say the same, without the second having to speak, is what two that both speak have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from qconvert.core.scheme import FP8, Scheme, int4
from qconvert.parity.continuation import Common, common_curve, common_metrics, continue_both, continued, prompts_of
from qconvert.parity.kept_states import StateFolder
from qconvert.parity.run import ParityOptions, compare
from qconvert.weights.source import CheckpointWeights
from reference_model.generate import generate
from reference_model.load import MemoryStore
from reference_model.model import CausalLM
from tests.conftest import Converted
from tests.parity.test_model import BATCHES, whole

LIMIT = 12

ROWS = (torch.randint(416, (6, 24), generator=torch.Generator().manual_seed(5)),)


def greedily(model: CausalLM, prompts: list[Tensor], limit: int) -> Tensor:
    """What the model says, row by row alone, by itself."""
    rows = [generate(model, row[None], max_new_tokens=limit).tokens[0, len(row) :] for one in prompts for row in one]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)


@pytest.mark.parametrize("scheme", [int4(32), FP8], ids=str)
def test_they_part_where_two_that_speak_part(scheme: Scheme, conversions: Converted) -> None:
    original, out = conversions(scheme)
    prompts = prompts_of(ROWS, 6)
    with CheckpointWeights.open(original) as a, CheckpointWeights.open(out) as b:
        found = continue_both(a, b, ROWS, 6, LIMIT, MemoryStore(), 1 << 20)
    ours, theirs = (greedily(whole(path), prompts, LIMIT) for path in (original, out))
    same = (ours == theirs).to(torch.int64).cumprod(1).sum(1)
    assert found.plain.tokens.tolist() == same.tolist()
    assert 0 < found.plain.tokens.mean() < LIMIT
    assert (found.plain is found.served) == (scheme != FP8)
    assert scheme != FP8 or found.served.tokens.mean() < found.plain.tokens.mean()


def test_what_is_said_is_what_the_whole_model_says(conversions: Converted) -> None:
    original, _ = conversions(int4(32))
    prompts, store = prompts_of(BATCHES, 3), MemoryStore()
    with CheckpointWeights.open(original) as source:
        said = continued(source, prompts, LIMIT, store, 1 << 20)
    assert torch.equal(torch.cat(said), greedily(whole(original), prompts, LIMIT))
    assert not store.tensors  # nothing is left behind


def test_a_killed_run_says_the_rest(conversions: Converted, tmp_path: Path) -> None:
    class KilledError(Exception):
        pass

    def until(last: int) -> Callable[[int, int], None]:
        def progress(done: int, total: int) -> None:
            told.append(done)
            if done == last:
                raise KilledError

        return progress

    original, _ = conversions(int4(32))
    prompts, told, folder = prompts_of(BATCHES, 2), list[int](), StateFolder(folder=tmp_path)
    with CheckpointWeights.open(original) as source:
        at_once = continued(source, prompts, LIMIT, MemoryStore(), 1 << 20)
        with pytest.raises(KilledError):
            continued(source, prompts, LIMIT, MemoryStore(), 1 << 20, folder=folder, progress=until(5))
        rest = continued(source, prompts, LIMIT, MemoryStore(), 1 << 20, folder=folder, progress=until(-1))
    assert told == [*range(1, 6), *range(6, LIMIT + 1)]
    assert all(torch.equal(a, b) for a, b in zip(at_once, rest, strict=True))


def test_a_row_that_has_ended_counts_up_to_its_end(conversions: Converted) -> None:
    original, _ = conversions(int4(32))
    with CheckpointWeights.open(original) as source:
        prompts = prompts_of(BATCHES, 3)
        said = torch.cat(continued(source, prompts, LIMIT, MemoryStore(), 1 << 20))
        end = int(said[0, 3])
        text = replace(source.config.text, eos_token_ids=(end,))
        source.view = replace(source.view, config=replace(source.config, text=text))
        found = continue_both(source, source, BATCHES, 3, LIMIT, MemoryStore(), 1 << 20).plain
    first = [row.index(end) + 1 if end in row else LIMIT for row in said.tolist()]
    assert found.said.tolist() == found.tokens.tolist() == first
    assert not found.parted.any()


def test_prompts_are_the_beginnings_of_all_windows_before_any_second_piece() -> None:
    batches = [torch.arange(260).view(2, 130), torch.arange(1000, 1100).view(1, 100)]
    (one,) = prompts_of(batches, 4)
    assert one[:, 0].tolist() == [0, 130, 1000, 64] and one.shape == (4, 64)
    assert prompts_of([torch.arange(10).view(1, 10)], 99)[0].shape == (1, 10)


def test_numbers_are_those_of_the_prompts() -> None:
    found = Common(tokens=np.array([0, 2, 8, 5]), said=np.array([8, 8, 8, 5]), limit=8)
    numbers = {one.name: one for one in common_metrics(found, "as served", 0)}
    assert numbers["greedy_common_mean"].value == 3.75
    assert numbers["greedy_common_median"].value == 3.5
    assert numbers["greedy_never_parted"].value == 0.5
    assert all(one.low <= one.value <= one.high and one.better == "high" for one in numbers.values())
    curve = dict(common_curve(found, "as served").points)
    assert [curve[n] for n in (0.0, 1.0, 2.0, 3.0, 8.0)] == [100, 75, 75, 50, 50]


def test_the_report_tells_of_it(conversions: Converted) -> None:
    report = compare(*conversions(int4(32)), ParityOptions(tokens=128, window=32, greedy=4, greedy_tokens=5))
    assert report.metric("greedy_common_mean", "as served").unit == "count"
    assert any(curve.name == "greedy_common" for curve in report.curves)
    assert any("4 prompts were continued" in note for note in report.notes)
