"""Log-probabilities from a file bound what the models themselves say, and only of the same text."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from qconvert.cli.app import app
from qconvert.core.errors import SourceError, UsageError
from qconvert.core.metric import Verdict
from qconvert.core.scheme import FP8
from qconvert.parity.limits import bounds
from qconvert.parity.logits import score
from qconvert.parity.options import ParityOptions
from qconvert.parity.report import ParityReport
from qconvert.parity.run import compare
from qconvert.parity.saved import LikeliestScan, SavedLogprobs, read_logprobs
from qconvert.parity.truncated import KnownTokensScan, between
from qconvert.parity.windows import random_windows
from qconvert.texts.documents import Text
from tests.conftest import Converted
from tests.tolerances import tolerances

LIMITS = tolerances("parity")
FEW = ParityOptions(tokens=128, window=32)


def saved(logits: Tensor, targets: Tensor, kept: int, slab: int) -> SavedLogprobs:
    scan = LikeliestScan(targets, kept, logits.shape[1])
    for first in range(0, logits.shape[1], slab):
        scan.add(0, first, logits[:, first : first + slab])
    ids, logprobs, tail, target = scan.result()
    return SavedLogprobs(
        windows=random_windows(9, 2, 2, 0), ids=ids, logprobs=logprobs, tail=tail, target=target,
        vocabulary=logits.shape[1], tokenizer="", model="", model_hash="",
    )  # fmt: skip


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 1000), tokens=st.integers(1, 70), words=st.integers(6, 90), kept=st.integers(5, 100),
    slab=st.integers(3, 100), noise=st.sampled_from([0.0, 0.3, 3.0]),
)  # fmt: skip
def test_what_is_kept_bounds_what_there_was(
    seed: int, tokens: int, words: int, kept: int, slab: int, noise: float
) -> None:
    gen = torch.Generator().manual_seed(seed)
    original = 3 * torch.randn(tokens, words, generator=gen)
    converted = original + noise * torch.randn(tokens, words, generator=gen)
    targets = torch.randint(words, (tokens,), generator=gen)
    whole = score(original, converted, targets)
    ours, theirs = (saved(logits, targets, kept, slab) for logits in (original, converted))
    p = original.double().softmax(1).sort(1, descending=True).values
    np.testing.assert_allclose(ours.logprobs.exp().numpy(), p[:, :kept].numpy(), atol=LIMITS["saved"])
    np.testing.assert_allclose(ours.tail.exp().numpy(), p[:, kept:].sum(1).numpy(), atol=LIMITS["saved"])
    scans = []
    for file, logits in ((ours, converted), (theirs, original)):
        scan = KnownTokensScan(file.ids, targets)
        for first in range(0, words, slab):
            scan.add(0, first, logits[:, first : first + slab])
        scans.append(scan)
    found = [
        scans[0].against(ours, original=False), scans[1].against(theirs, original=True), between(ours, theirs),
    ]  # fmt: skip
    for one in found:
        assert (one.scores.kl <= whole.kl + LIMITS["saved"]).all()
        assert (one.scores.kl_reverse <= whole.kl_reverse + LIMITS["saved"]).all()
        assert (whole.kl <= one.kl_most + LIMITS["saved"]).all()
        np.testing.assert_allclose(one.scores.nll_original, whole.nll_original, atol=LIMITS["scan"])
        np.testing.assert_allclose(one.scores.nll_converted, whole.nll_converted, atol=LIMITS["scan"])
        assert (one.scores.agree == whole.agree).all()
        np.testing.assert_allclose(one.scores.likeliest, whole.likeliest)
        if kept >= words:
            np.testing.assert_allclose(one.scores.kl, whole.kl, atol=LIMITS["saved"])
            np.testing.assert_allclose(one.scores.kl_reverse, whole.kl_reverse, atol=LIMITS["saved"])
            np.testing.assert_allclose(one.kl_most, whole.kl, atol=LIMITS["saved"])
            assert np.isfinite(one.highest.kl_reverse).all()
        elif one is not found[0]:
            assert np.isinf(one.kl_most).all()
    assert np.isfinite(found[0].kl_most).all()


def test_a_nan_is_no_agreement() -> None:
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    broken = logits.clone()
    broken[1, 4] = torch.nan
    targets = torch.arange(3)
    file = saved(logits, targets, 6, 20)
    scan = KnownTokensScan(file.ids, targets)
    scan.add(0, 0, broken)
    found = scan.against(file, original=False)
    assert np.isnan(found.scores.kl).tolist() == np.isnan(found.kl_most).tolist() == [False, True, False]
    assert found.scores.agree.tolist() == [True, False, True]


@pytest.fixture(scope="module")
def files(conversions: Converted, tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, ParityReport]]:
    folder = tmp_path_factory.mktemp("saved")
    made = {}
    for kept in (40, 416):
        path = folder / f"{kept}.safetensors"
        options = ParityOptions(tokens=128, window=32, save_logprobs=path, kept=kept)
        made[kept] = path, compare(*conversions(FP8), options)
    return made


def test_all_tokens_give_the_numbers_of_the_checkpoint(
    files: dict[int, tuple[Path, ParityReport]], conversions: Converted
) -> None:
    path, whole = files[416]
    found = compare(path, conversions(FP8)[1], FEW)
    for mode in ("weights only", "as served"):
        for one in whole.metrics:
            if one.where == mode and one.name in ("kl_mean", "kl_reverse_p99", "top5_agreement", "perplexity_ratio"):
                value = found.metric(one.name, mode)
                assert (value.value, value.low, value.high) == pytest.approx(
                    (one.value, one.low, one.high), abs=LIMITS["saved"]
                )
        assert found.metric("kl_truncation", mode).value == 0
    assert found.tokens == whole.tokens
    assert found.tensors == found.causes == ()
    assert "cannot be told" in found.notes[0]


def test_some_tokens_bound_them_and_a_limit_in_between_is_undecided(
    files: dict[int, tuple[Path, ParityReport]], conversions: Converted
) -> None:
    path, whole = files[40]
    out, exact = conversions(FP8)[1], whole.metric("kl_mean", "as served").value
    found = compare(path, out, FEW).metric("kl_mean", "as served")
    assert found.value < exact < found.high < math.inf
    limit = (found.value + found.high) / 2
    judged = compare(path, out, ParityOptions(limits=bounds(kl_mean=limit)))
    assert judged.verdict is Verdict.AMBIGUOUS
    assert f"at most {judged.metric('kl_truncation', 'as served').value:.3g} nats higher" in " ".join(judged.notes)
    assert compare(path, out, ParityOptions(limits=bounds(kl_mean=found.high * 1.01))).verdict is Verdict.PASS


def test_a_file_is_a_converted_side_too(files: dict[int, tuple[Path, ParityReport]], conversions: Converted) -> None:
    path, _ = files[40]
    for original in (conversions(FP8)[0], path):
        found = compare(original, path, FEW)
        assert found.metric("kl_mean", "as served").value < LIMITS["saved"]
        assert found.metric("kl_mean", "as served").high == math.inf
        assert found.metric("top1_agreement", "as served").value == 1


def edited(path: Path, folder: Path, change: dict[str, Tensor], said: dict[str, str]) -> Path:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file({**load_file(path), **change}, folder / "edited.safetensors", metadata={**metadata, **said})
    return folder / "edited.safetensors"


def test_other_text_tokenizer_or_vocabulary_is_refused(
    files: dict[int, tuple[Path, ParityReport]], conversions: Converted, tmp_path: Path
) -> None:
    path, (original, out) = files[40][0], conversions(FP8)
    other = tmp_path / "ids.npy"
    np.save(other, np.arange(128))
    with pytest.raises(UsageError, match="other tokens"):
        compare(path, out, ParityOptions(tokens=128, window=32, texts=(Text(name="x", path=other),)))
    with pytest.raises(UsageError, match="over 500 tokens"):
        compare(edited(path, tmp_path, {}, {"vocabulary": "500"}), out)
    (tmp_path / "copy").mkdir()
    for one in out.iterdir():
        (tmp_path / "copy" / one.name).symlink_to(one)
    (tmp_path / "copy" / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UsageError, match="another tokenizer"):
        compare(edited(path, tmp_path, {}, {"tokenizer": "0" * 64}), tmp_path / "copy")
    with pytest.raises(UsageError, match="neither weights nor layers"):
        compare(path, out, ParityOptions(layers=True))
    with pytest.raises(UsageError, match="no log-probabilities to save"):
        compare(original, out, ParityOptions(run_model=False, save_logprobs=tmp_path / "x"))


def test_a_file_that_contradicts_itself_is_refused(files: dict[int, tuple[Path, ParityReport]], tmp_path: Path) -> None:
    path = files[40][0]
    tensors = load_file(path)
    twice = tensors["ids"].clone()
    twice[0, 1] = twice[0, 0]
    for change, said, expected in (
        ({}, {"format": "other/1"}, "other/1"),
        ({}, {"domains": "[]"}, "one name a window"),
        ({}, {"tokens_hash": "0"}, "tokens_hash"),
        ({"tail": tensors["tail"] + 1}, {}, "add up"),
        ({"tail": tensors["tail"] * torch.nan}, {}, "add up"),
        ({"target": tensors["target"] * torch.nan}, {}, "no log-probability"),
        ({"target": tensors["target"].abs() + 1}, {}, "no log-probability"),
        ({"ids": twice}, {}, "twice"),
        ({"ids": tensors["ids"] + 400}, {}, "outside the vocabulary"),
        ({"target": tensors["target"][:-1]}, {}, "one row for each position"),
        ({"windows": tensors["windows"][:-1]}, {}, "fill the windows"),
        ({"logprobs": tensors["logprobs"].flip(1)}, {}, "likeliest first"),
    ):
        with pytest.raises(SourceError, match=expected):
            read_logprobs(edited(path, tmp_path, change, said))
    (tmp_path / "text.safetensors").write_text("no", encoding="utf-8")
    with pytest.raises(SourceError, match="cannot read"):
        read_logprobs(tmp_path / "text.safetensors")


def test_the_command_saves_and_takes_them(conversions: Converted, tmp_path: Path) -> None:
    original, out = map(str, conversions(FP8))
    path = str(tmp_path / "saved.safetensors")
    few = ["--tokens", "64", "--window", "32", "--json"]
    result = CliRunner().invoke(app, ["parity", original, out, "--save-logprobs", path, "--top-k", "20", *few])
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(app, ["parity", path, out, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["tokens"] == 62
