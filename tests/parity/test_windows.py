"""Tokens are cut into windows without loss, texts take turns, and the same seed gives the same tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from qconvert.core.errors import SourceError, UsageError
from qconvert.parity import windows
from qconvert.parity.windows import choose_windows, random_windows, text_windows
from qconvert.texts.documents import Text


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder whose tokenizer gives every letter the number of its place in the alphabet."""
    letters = {chr(ord("a") + i): i for i in range(26)}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    (tmp_path / "model").mkdir()
    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    return tmp_path / "model"


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def named(path: Path) -> Text:
    return Text.parse(str(path))


def letters(batches: tuple[torch.Tensor, ...]) -> list[str]:
    return ["".join(chr(ord("a") + i) for i in row) for batch in batches for row in batch.tolist()]


def test_windows_of_one_text_are_its_tokens_in_order(model: Path, tmp_path: Path) -> None:
    text = write(tmp_path, "t.txt", "abcdefghijklmnopqrst")
    found = text_windows(model, [named(text)], 6, 100)
    assert letters(found.batches) == ["abcdef", "ghijkl", "mnopqr", "st"]
    assert found.tokens == 20
    assert "t.txt" in found.description


def test_texts_take_turns_until_the_limit(model: Path, tmp_path: Path) -> None:
    texts = [named(write(tmp_path, "1.txt", "aaaabbbbcccc")), named(write(tmp_path, "2.txt", "xxxxyyyy"))]
    assert letters(text_windows(model, texts, 4, 100).batches) == ["aaaa", "xxxx", "bbbb", "yyyy", "cccc"]
    assert letters(text_windows(model, texts, 4, 10).batches) == ["aaaa", "xxxx", "bb"]


def test_a_last_window_of_one_token_is_dropped(model: Path, tmp_path: Path) -> None:
    text = write(tmp_path, "t.txt", "abcde")
    assert letters(text_windows(model, [named(text)], 4, 100).batches) == ["abcd"]


@given(length=st.integers(2, 700), tokens=st.integers(2, 3000), seed=st.integers(0, 3))
def test_random_windows_fill_the_limit(length: int, tokens: int, seed: int) -> None:
    found = random_windows(50, length, tokens, seed)
    assert tokens - found.tokens <= 1
    assert all(2 <= batch.shape[1] <= length for batch in found.batches)
    assert all(batch.numel() <= max(windows.BATCH_TOKENS, length) for batch in found.batches)
    again = random_windows(50, length, tokens, seed)
    assert all(torch.equal(a, b) for a, b in zip(found.batches, again.batches, strict=True))


def test_without_a_tokenizer_tokens_are_random(tmp_path: Path) -> None:
    found = choose_windows(tmp_path, 30, texts=(), tokens=64, length=16, seed=5)
    assert found.tokens == 64
    assert "random" in found.description


def test_held_out_texts_are_the_default(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "heldout"
    folder.mkdir()
    write(folder, "b.txt", "bbbb")
    write(folder, "a.txt", "aaaa")
    monkeypatch.setattr(windows, "HELD_OUT", folder)
    found = choose_windows(model, 26, texts=(), tokens=64, length=4, seed=0)
    assert letters(found.batches) == ["aaaa", "bbbb"]


def test_what_cannot_be_read_is_named(model: Path, tmp_path: Path) -> None:
    text = write(tmp_path, "t.txt", "abc")
    with pytest.raises(UsageError, match="no tokenizer"):
        text_windows(tmp_path, [named(text)], 4, 10)
    with pytest.raises(UsageError, match="missing"):
        text_windows(model, [named(tmp_path / "missing.txt")], 4, 10)
    with pytest.raises(UsageError, match="fewer than two"):
        text_windows(model, [named(write(tmp_path, "e.txt", "a"))], 4, 10)
    with pytest.raises(UsageError, match="at least 2"):
        choose_windows(model, 26, texts=(), tokens=1, length=4, seed=0)
    (model / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(SourceError, match=r"tokenizer\.json"):
        text_windows(model, [named(text)], 4, 10)
