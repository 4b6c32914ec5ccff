"""The corpus is the same every time, and what is held out is nowhere in the training text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from calibration.corpus import DOMAINS, HELD_OUT_FILES, HELD_OUT_TOPICS, Corpus, CorpusError, collect

MODULE = '''"""Fold {name}."""


def fold(paper, times=2):
    """Fold the {name} paper some times and say how thick it is, then unfold it and say how much thicker it stayed."""
    return paper * times
'''
SHARED = "# Permission is hereby granted to whoever reads this to read it once more, and to smile at it."


@pytest.fixture
def stdlib(tmp_path: Path) -> Path:
    """A standard library with the files that are held out and a few to train on."""
    topics = {topic: f"All about {topic}, which nobody has seen." for topic in (*HELD_OUT_TOPICS, "assert", "yield")}
    names = [*HELD_OUT_FILES, "paper.py", "test/skipped.py", "sub/tests/skipped.py", "idlelib/NEWS.txt"]
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{SHARED}\n\n" + MODULE.format(name=name), encoding="utf-8")
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "pydoc_data" / "topics.py").write_text(f"topics = {topics!r}\n", encoding="utf-8")
    (tmp_path / "broken.py").write_text("def (:\n", encoding="utf-8")
    (tmp_path / "old.py").write_bytes("# caf\xe9\r\n".encode("latin-1"))
    return tmp_path


@pytest.fixture(scope="module")
def real() -> Corpus:
    return collect()


def test_two_readings_are_equal_and_a_changed_letter_is_not(stdlib: Path) -> None:
    first = collect(stdlib)
    assert first == collect(stdlib)
    assert first.digest == collect(stdlib).digest
    (stdlib / "paper.py").write_text("x = 1\n", encoding="utf-8")
    assert collect(stdlib).digest != first.digest


def test_held_out_files_give_their_own_view_only(stdlib: Path) -> None:
    corpus = collect(stdlib)
    views = {document.name.partition(":")[2]: document.domain for document in corpus.held_out}
    assert views == HELD_OUT_FILES | dict.fromkeys(HELD_OUT_TOPICS, "reference")
    assert not {d.name.partition(":")[2] for d in corpus.train} & views.keys()


def test_a_paragraph_that_was_held_out_is_taken_from_the_training_text(stdlib: Path) -> None:
    corpus = collect(stdlib)
    assert SHARED in corpus.held_out_text("code")
    assert not any(SHARED in document.text for document in corpus.train)
    assert any("Fold paper.py" in document.text for document in corpus.train)


def test_skipped_broken_and_latin_1_files(stdlib: Path) -> None:
    texts = {document.name: document.text for document in collect(stdlib).train}
    assert not any("skipped" in name for name in texts)
    assert texts["code:broken.py"] == "def (:\n"
    assert texts["code:old.py"] == "# caf\u00e9\n"


def test_a_missing_held_out_file_is_named(stdlib: Path) -> None:
    (stdlib / "shlex.py").unlink()
    with pytest.raises(CorpusError, match=r"missing: shlex\.py"):
        collect(stdlib)


def test_no_topics_is_an_error(stdlib: Path) -> None:
    (stdlib / "pydoc_data" / "topics.py").unlink()
    with pytest.raises(CorpusError, match="topics"):
        collect(stdlib)


def test_this_python_has_every_domain_and_no_leak(real: Corpus) -> None:
    assert all(len(real.held_out_text(domain)) > 8_000 for domain in DOMAINS)
    assert sum(len(document.text) for document in real.train) > 5_000_000
    blocks = {
        " ".join(block.split())
        for document in real.held_out
        for block in document.text.split("\n\n")
        if len(block) > 80
    }
    assert len(blocks) > 100
    for document in real.train:
        shared = blocks & {" ".join(block.split()) for block in document.text.split("\n\n")}
        assert not shared, document.name


def test_config_views_are_json_or_ini(real: Corpus) -> None:
    views = [document for document in real.train if document.domain == "config"]
    braces = [document for document in views if document.text.startswith("{")]
    assert 0 < len(braces) < len(views)
    assert all(json.loads(document.text)["entries"] for document in braces)
