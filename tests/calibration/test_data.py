"""Calibration sees the same tokens for the same texts and seed, in windows of one length, and texts of its own."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from calibration.corpus import SHARED_BLOCK, Corpus, collect
from calibration.data import SHIPPED, CalibrationWindows, calibration_windows, shipped_texts
from qconvert.cli.demo import CHECKPOINT
from qconvert.core.errors import UsageError
from qconvert.parity.windows import HELD_OUT
from qconvert.texts.documents import Text


def ids(folder: Path, **streams: range) -> list[Text]:
    """Token ids in a file for each name."""
    for name, stream in streams.items():
        np.save(folder / f"{name}.npy", np.array(stream))
    return [Text.parse(str(folder / f"{name}.npy")) for name in streams]


def windows(
    folder: Path, texts: list[Text], tokens: int = 96, window: int = 8, seed: int = 0, vocabulary: int = 500
) -> CalibrationWindows:
    return calibration_windows(folder, vocabulary, texts=texts, tokens=tokens, window=window, seed=seed)


def rows(found: CalibrationWindows) -> list[list[int]]:
    return [row for batch in found.batches for row in batch.tolist()]


def test_windows_are_whole_and_consecutive_and_none_comes_twice(tmp_path: Path) -> None:
    found = windows(tmp_path, ids(tmp_path, a=range(100, 203)), tokens=1000)
    starts = sorted(row[0] for row in rows(found))
    assert starts == list(range(100, 196, 8))
    assert all(row == list(range(row[0], row[0] + 8)) for row in rows(found))
    assert found.tokens == found.record["tokens"] == 96
    assert found.record["domains"] == {"a": {"tokens": 96, "of": 96}}


def test_domains_take_turns_until_there_are_enough_tokens(tmp_path: Path) -> None:
    found = windows(tmp_path, ids(tmp_path, a=range(16), b=range(100, 180), c=range(200, 280)), tokens=80)
    taken = [row[0] // 100 for row in rows(found)]
    assert taken == [0, 1, 2, 0, 1, 2, 1, 2, 1, 2]
    assert {name: one["tokens"] for name, one in found.record["domains"].items()} == {"a": 16, "b": 32, "c": 32}


def test_batches_have_one_length_and_about_two_thousand_tokens(tmp_path: Path) -> None:
    found = windows(tmp_path, ids(tmp_path, a=range(9000)), tokens=5000, window=500, vocabulary=9000)
    assert [tuple(batch.shape) for batch in found.batches] == [(4, 500), (4, 500), (2, 500)]
    assert {batch.dtype for batch in found.batches} == {torch.int64}


def test_the_same_texts_and_seed_give_the_same_tokens_and_another_seed_others(tmp_path: Path) -> None:
    texts = ids(tmp_path, a=range(300), b=range(100, 400))
    first, again, other = (windows(tmp_path, texts, seed=seed) for seed in (3, 3, 4))
    assert rows(first) == rows(again) != rows(other)
    assert first.record == again.record
    assert first.record["ids_sha256"] != other.record["ids_sha256"]


def test_the_record_is_plain_json_with_the_hashes_of_files_and_tokens(tmp_path: Path) -> None:
    texts = ids(tmp_path, a=range(300))
    record = windows(tmp_path, texts).record
    assert json.loads(json.dumps(record)) == record
    entry = {key: record["texts"][0][key] for key in ("domain", "file", "sha256", "documents", "tokens")}
    digest = hashlib.sha256(texts[0].path.read_bytes()).hexdigest()
    assert entry == {"domain": "a", "file": "a.npy", "sha256": digest, "documents": 1, "tokens": 300}
    stream = b"".join(i.to_bytes(8, "little") for row in rows(windows(tmp_path, texts)) for i in row)
    assert record["ids_sha256"] == hashlib.sha256(stream).hexdigest()
    assert record["tokenizer"] is None
    assert str(tmp_path) not in json.dumps(record)


def test_which_windows_a_seed_draws_is_written_down(tmp_path: Path) -> None:
    """Another order would be other statistics from the same command."""
    found = windows(tmp_path, ids(tmp_path, a=range(80)), tokens=80)
    assert [row[0] for row in rows(found)] == [16, 40, 24, 0, 32, 72, 64, 56, 8, 48]


def test_texts_of_one_name_are_one_domain(tmp_path: Path) -> None:
    paths = [one.path for one in ids(tmp_path, a=range(20), b=range(100, 124))]
    found = windows(tmp_path, [Text(name="both", path=path) for path in paths], tokens=1000)
    assert found.record["domains"] == {"both": {"tokens": 40, "of": 40}}
    assert sum(row[0] < 100 <= row[-1] for row in rows(found)) == 1, "documents follow each other in one stream"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"window": 1}, "windows of 1 tokens"),
        ({"tokens": 7}, "7 tokens in all"),
        ({"window": 90, "tokens": 900}, r"the text 'a' .*50 tokens do not fill one window of 90.* shorter windows"),
        ({"vocabulary": 40}, r"'a': token ids from 0 to 47, the vocabulary of .* has 40"),
    ],
)
def test_what_does_not_fit_is_one_error(change: dict[str, int], says: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=says):
        windows(tmp_path, ids(tmp_path, a=range(50)), **change)


def test_the_texts_that_come_along_are_read_by_the_demo_checkpoint() -> None:
    found = windows(CHECKPOINT, [], tokens=4096, window=256, vocabulary=2048)
    assert found.tokens == 4096
    assert set(found.record["domains"]) == {text.name for text in shipped_texts(CHECKPOINT)}
    assert all(one["tokens"] >= 256 for one in found.record["domains"].values())
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    assert tokenizer.decode(rows(found)[0]).strip()


def test_without_a_chat_template_the_conversations_stay_out(tmp_path: Path) -> None:
    assert {text.path.suffix for text in shipped_texts(tmp_path)} == {".txt"}
    assert {text.path.suffix for text in shipped_texts(CHECKPOINT)} == {".txt", ".jsonl"}


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return collect()


def paragraphs(text: str) -> set[str]:
    keys = (" ".join(block.split()) for block in text.split("\n\n"))
    return {key for key in keys if len(key) >= SHARED_BLOCK}


def shipped_paragraphs() -> set[str]:
    found: set[str] = set()
    for text in shipped_texts(CHECKPOINT):
        content = text.path.read_text(encoding="utf-8")
        if text.path.suffix == ".jsonl":
            said = (turn["content"] for line in content.splitlines() for turn in json.loads(line)["messages"])
            content = "\n\n".join(said)
        found |= paragraphs(content)
    return found


def test_no_paragraph_that_comes_along_was_held_out_or_trained_on(corpus: Corpus) -> None:
    held_out = set().union(*(paragraphs(path.read_text(encoding="utf-8")) for path in HELD_OUT.glob("*.txt")))
    trained = set().union(*(paragraphs(document.text) for document in (*corpus.train, *corpus.held_out)))
    ours = shipped_paragraphs()
    assert len(ours) > 300
    assert not ours & held_out
    assert not ours & trained


def test_no_paragraph_that_comes_along_comes_twice() -> None:
    for text in shipped_texts(CHECKPOINT):
        if text.path.suffix == ".txt":
            blocks = [" ".join(block.split()) for block in text.path.read_text(encoding="utf-8").split("\n\n")]
            long = [block for block in blocks if len(block) >= SHARED_BLOCK]
            assert len(long) == len(set(long)), text.path.name


def test_several_hundred_kilobytes_come_along_in_several_domains() -> None:
    sizes = {path.name: path.stat().st_size for path in SHIPPED.iterdir()}
    assert len(sizes) >= 5
    assert sum(sizes.values()) > 200_000
