"""Any text survives the tokenizer, and its files mean the same to transformers."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, Qwen2Tokenizer

from calibration.demo_config import CONFIG, CONTEXT, FILES, GENERATION_CONFIG, TOKEN_IDS
from calibration.tokenizer import SPECIAL_TOKENS, load_tokenizer, save_tokenizer, train_tokenizer, write_json

TEXT = ["def fold(paper):\n    return paper * 2\n\n\nclass Paper:\n    pass  # it's thin\n"] * 3
SIZE = 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(TEXT, SIZE), path, CONTEXT)
    write_json(path / "config.json", FILES["config.json"])
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
def test_every_nfc_text_survives(tokenizer: Tokenizer, text: str) -> None:
    text = unicodedata.normalize("NFC", text)
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_special_tokens_are_the_last_ids(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS]
    assert ids == list(range(SIZE - len(SPECIAL_TOKENS), SIZE)) == sorted(tokenizer.get_vocab().values())[-8:]
    for token, number in zip(SPECIAL_TOKENS, ids, strict=True):
        assert tokenizer.encode(f"a{token}b").ids[1] == number


def test_training_twice_gives_the_same_files(folder: Path, tmp_path: Path) -> None:
    save_tokenizer(train_tokenizer(TEXT, SIZE), tmp_path, CONTEXT)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes()


def test_too_little_text_is_an_error() -> None:
    with pytest.raises(ValueError, match="4992 were asked for"):
        train_tokenizer(TEXT, 5000)


@pytest.mark.parametrize("load", [AutoTokenizer, Qwen2Tokenizer])
def test_transformers_reads_the_same_tokens(load: Any, folder: Path, tokenizer: Tokenizer) -> None:
    theirs = load.from_pretrained(folder)
    text = "def f(x):\n    return x ** 2  # caf\u00e9 12345, it's\n\n<|im_start|>user\n"
    assert theirs(text).input_ids == tokenizer.encode(text).ids
    assert theirs.decode(theirs(text).input_ids) == text
    assert (theirs.eos_token, theirs.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_chat_template(folder: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(folder)
    image = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}
    messages = [{"role": "system", "content": "be short"}, image]
    assert theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nbe short<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>what is it?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_the_ids_of_the_config_are_those_of_the_tokenizer() -> None:
    named = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    assert {field: CONFIG[field] for field in named} == {field: TOKEN_IDS[token] for field, token in named.items()}
    assert CONFIG["text_config"]["eos_token_id"] == TOKEN_IDS["<|endoftext|>"]
    assert GENERATION_CONFIG["eos_token_id"] == [TOKEN_IDS["<|im_end|>"], TOKEN_IDS["<|endoftext|>"]]
    assert max(TOKEN_IDS.values()) == CONFIG["text_config"]["vocab_size"] - 1
    assert json.loads(json.dumps(CONFIG)) == CONFIG
