"""Texts, conversations and token ids become documents as the checkpoint's own tokenizer and template say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer
from typer.testing import CliRunner

from qconvert.cli.app import app
from qconvert.cli.demo import CHECKPOINT
from qconvert.core.errors import UsageError
from qconvert.core.scheme import int4
from qconvert.parity.windows import choose_windows
from qconvert.texts.documents import Reader, Text
from tests.conftest import Converted

MESSAGES = [
    {"role": "user", "content": "Was ist 2 + 2?"},
    {"role": "assistant", "content": "4, \u201esure\u201c."},
]


def documents(path: Path, model: Path = CHECKPOINT) -> list[list[int]]:
    return [ids.tolist() for ids in Reader(model).documents(Text.parse(str(path)))]


def lines(folder: Path, *rows: object) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_conversation_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    upstream = AutoTokenizer.from_pretrained(CHECKPOINT)
    expected = upstream.apply_chat_template(MESSAGES, tokenize=True, return_dict=False)
    assert documents(lines(tmp_path, {"messages": MESSAGES})) == [expected]


def test_a_line_is_a_document(tmp_path: Path) -> None:
    path = lines(tmp_path, {"text": "one and"}, {"token_ids": [3, 1, 2]}, {"text": "two"})
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    assert documents(path) == [tokenizer.encode("one and").ids, [3, 1, 2], tokenizer.encode("two").ids]
    found = choose_windows(CHECKPOINT, 2048, texts=[Text(name="mine", path=path)], tokens=100, length=50, seed=0)
    assert sorted(row for batch in found.batches for row in batch.tolist()) == sorted(
        ids for ids in documents(path) if len(ids) > 1
    )
    assert set(found.places.domains) == {"mine"}


@pytest.mark.parametrize("dtype", [np.int32, np.uint16, np.int64])
def test_token_ids_need_no_tokenizer(dtype: type, tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", np.array([5, 6, 7], dtype=dtype))
    np.save(tmp_path / "two.npy", np.array([[5, 6], [7, 8]], dtype=dtype))
    assert documents(tmp_path / "one.npy", tmp_path) == [[5, 6, 7]]
    assert documents(tmp_path / "two.npy", tmp_path) == [[5, 6], [7, 8]]
    with pytest.raises(UsageError, match=r"the vocabulary of .* has 7"):
        choose_windows(tmp_path, 7, texts=[Text.parse(str(tmp_path / "one.npy"))], tokens=9, length=9, seed=0)


def test_a_name_goes_before_the_file(tmp_path: Path) -> None:
    assert Text.parse("legal=a/b.txt") == Text(name="legal", path=Path("a/b.txt"))
    assert Text.parse("a/b=c.txt") == Text(name="b=c", path=Path("a/b=c.txt"))
    odd = tmp_path / "x=y.txt"
    odd.write_text("z", encoding="utf-8")
    assert Text.parse(str(odd)).path == odd
    for bad in ("", "x=", "=x", " =x"):
        with pytest.raises(UsageError, match="NAME=FILE"):
            Text.parse(bad)


def test_places_follow_the_rows_of_the_batches(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(7))
    np.save(tmp_path / "b.npy", np.arange(10, 14))
    texts = [Text.parse(str(tmp_path / name)) for name in ("a.npy", "b.npy")]
    found = choose_windows(tmp_path, 50, texts=texts, tokens=100, length=4, seed=0)
    assert found.domains == (("a", "b"), ("a",))
    assert found.targets.tolist() == [1, 2, 3, 11, 12, 13, 5, 6]
    assert found.places.position.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert [found.places.domains[n] for n in found.places.domain] == list("aaabbbaa")


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ([1], "line 1"),
        ({"words": "x"}, "line 1: expected an object with messages, text or token_ids"),
        ({"token_ids": [1, 2.5]}, "whole numbers"),
        ({"token_ids": [True]}, "whole numbers"),
        ({"token_ids": [-1]}, "whole numbers"),
        ({"messages": [{"role": "user", "content": 5}]}, "does not take it"),
    ],
)
def test_a_line_that_is_something_else_is_named(row: object, says: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=says):
        documents(lines(tmp_path, row))


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% if %}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_hostile_template_is_refused(template: str, tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
    (tmp_path / "tokenizer.json").write_bytes((CHECKPOINT / "tokenizer.json").read_bytes())
    with pytest.raises(UsageError, match="does not take it"):
        documents(lines(tmp_path, {"messages": MESSAGES}), tmp_path)


def test_without_a_template_there_is_no_conversation(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no chat template"):
        documents(lines(tmp_path, {"messages": MESSAGES}), tmp_path)
    (tmp_path / "bad.npy").write_bytes(b"nothing")
    with pytest.raises(UsageError, match="cannot read the token ids"):
        documents(tmp_path / "bad.npy")
    np.save(tmp_path / "float.npy", np.ones(3))
    with pytest.raises(UsageError, match="expected integers"):
        documents(tmp_path / "float.npy")


def test_the_command_reports_each_named_domain(conversions: Converted, tmp_path: Path) -> None:
    original, out = map(str, conversions(int4(32)))
    for n, name in enumerate("ab"):
        np.save(tmp_path / f"{name}.npy", np.arange(n, 400, 5))
    asked = ["--text", f"first={tmp_path / 'a.npy'}", "--text", str(tmp_path / "b.npy"), "--window", "80"]
    more = ["--layers", "--drafts", "--work", str(tmp_path / "work"), "--json"]
    result = CliRunner().invoke(app, ["parity", original, out, *asked, *more])
    assert result.exit_code == 0, result.output
    found = {(one["name"], one["where"]) for one in json.loads(result.stdout)["metrics"]}
    wheres = ("domain first", "domain b", "positions 0-63", "positions 64-78")
    assert {("kl_mean", f"as served, {where}") for where in wheres} <= found
    assert {("hidden_error", "as served, teacher-forced"), ("draft_acceptance_lost", "as served")} <= found
    assert ("state_drift", "weights only") in found
