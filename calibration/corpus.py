"""Text that any Python installation has, split by file into training and held-out documents.

Held-out files and topics are named one by one, so that the split does not move when a file is added elsewhere.
Nothing is imported from the files that are read: sources are parsed, never run.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sysconfig
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Domain = Literal["code", "docstrings", "reference", "config", "prose"]

DOMAINS: tuple[Domain, ...] = ("code", "docstrings", "reference", "config", "prose")

SKIPPED_FOLDERS = frozenset(
    {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "__pycache__",
        "encodings",
        "_pyrepl",
        "__phello__",
    }
)
"""Not everywhere installed, or tables rather than text."""

SKIPPED_FILES = frozenset({"pydoc_data/topics.py", "html/entities.py", "pydoc_data/module_docs.py"})
"""Read as topics instead, or tables rather than text."""

PROSE_FILES = ("LICENSE.txt", "email/architecture.rst", "idlelib/HISTORY.txt", "idlelib/NEWS.txt", "idlelib/README.txt")

HELD_OUT_FILES: dict[str, Domain] = {
    "graphlib.py": "code",
    "shlex.py": "code",
    "fractions.py": "docstrings",
    "textwrap.py": "docstrings",
    "calendar.py": "config",
    "cmd.py": "config",
    "LICENSE.txt": "prose",
    "email/architecture.rst": "prose",
}
"""Files that training never sees in any form, and the domain each is held out for."""

HELD_OUT_TOPICS = frozenset({"with", "lambda", "exceptions", "dynamic-features", "context-managers", "atom-identifiers",
                             "typesseq-mutable", "import", "bltin-ellipsis-object", "naming", "slicings"})  # fmt: skip
"""Topics of ``pydoc`` that training never sees."""

SHARED_BLOCK = 60
"""A training paragraph of at least so many characters is dropped when it was held out or already seen."""


class CorpusError(ValueError):
    """The Python installation has no usable standard-library text, or not the text that was recorded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One text: its ``name`` says the file or topic and the view taken of it."""

    name: str
    domain: Domain
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Training and held-out documents, each in a fixed order, and the SHA-256 over both."""

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]

    @property
    def digest(self) -> str:
        """SHA-256 over domain, name and text of every document in order."""
        digest = hashlib.sha256()
        for part in (self.train, self.held_out):
            for document in part:
                for piece in (document.domain, document.name, document.text):
                    encoded = piece.encode("utf-8")
                    digest.update(len(encoded).to_bytes(8, "little") + encoded)
        return digest.hexdigest()

    def held_out_text(self, domain: Domain) -> str:
        """All held-out text of one domain, documents separated by one blank line."""
        return "\n".join(document.text for document in self.held_out if document.domain == domain)


def collect(stdlib: Path | None = None) -> Corpus:
    """Read the corpus from a standard-library folder, by default that of the running interpreter.

    Raises:
        CorpusError: a held-out file or topic is missing.
    """
    root = stdlib or Path(sysconfig.get_path("stdlib"))
    train: list[Document] = []
    held_out: list[Document] = []
    for name, text in _sources(root):
        views = _views(name, text)
        domain = HELD_OUT_FILES.get(name)
        if domain is not None:
            held_out.extend(view for view in views if view.domain == domain)
        else:
            train.extend(views)
    for topic, text in _topics(root / "pydoc_data" / "topics.py"):
        document = Document(name=f"topic:{topic}", domain="reference", text=text)
        (held_out if topic in HELD_OUT_TOPICS else train).append(document)
    found = {document.name.partition(":")[2] for document in held_out}
    missing = sorted((set(HELD_OUT_FILES) | HELD_OUT_TOPICS) - found)
    if missing:
        raise CorpusError(f"{root}: held-out files or topics are missing: {', '.join(missing)}")
    held_out.sort(key=lambda document: (DOMAINS.index(document.domain), document.name))
    return Corpus(train=tuple(_without_shared_blocks(train, held_out)), held_out=tuple(held_out))


def _sources(root: Path) -> Iterator[tuple[str, str]]:
    """Relative POSIX name and NFC text of every file of the corpus, in the order of the names."""
    chosen = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        name = "/".join(parts)
        machine = parts[0].startswith(("_sysconfigdata", "config-"))
        if not machine and name not in SKIPPED_FILES and SKIPPED_FOLDERS.isdisjoint(parts):
            chosen.append((name, path))
    chosen += [(name, root / name) for name in PROSE_FILES if (root / name).is_file()]
    for name, path in sorted(chosen):
        text = _read(path)
        if text.strip():
            yield name, text


def _read(path: Path) -> str:
    """Text of ``path`` in NFC, with plain line ends and one at the end; a few old files are Latin-1."""
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    return _clean(text)


def _clean(text: str) -> str:
    lines = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n").replace("\f", "")
    return "\n".join(line.rstrip() for line in lines.expandtabs(8).split("\n")).strip("\n") + "\n"


def _topics(path: Path) -> Iterator[tuple[str, str]]:
    """Topics of ``pydoc`` by name, from the dictionary literal in its data file."""
    if not path.is_file():
        raise CorpusError(f"{path} is missing: this Python installation has no pydoc topics")
    for node in _parse(_read(path)).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "topics":
            for topic, text in sorted(ast.literal_eval(node.value).items()):
                yield topic, _clean(text)


def _views(name: str, text: str) -> list[Document]:
    """The documents made of one file: the source itself, and for some files its docstrings and its interface."""
    if not name.endswith(".py"):
        return [Document(name=f"prose:{name}", domain="prose", text=text)]
    views = [Document(name=f"code:{name}", domain="code", text=text)]
    # A third of the files gives each further view, so that they stay a small part of the corpus.
    share = hashlib.sha256(name.encode()).digest()[0] % 3
    held = HELD_OUT_FILES.get(name)
    try:
        tree = _parse(text)
    except SyntaxError:
        return views
    if share == 0 or held == "docstrings":
        page = "\n\n".join(f"{title}\n{'-' * len(title)}\n{doc}" for title, doc in _docstrings(tree) if len(doc) > 80)
        if page:
            views.append(Document(name=f"docstrings:{name}", domain="docstrings", text=_clean(page)))
    if share == 1 or held == "config":
        entries = list(_interface(tree, name))
        if entries:
            render = _as_ini if hashlib.sha256(name.encode()).digest()[1] % 2 else _as_json
            views.append(Document(name=f"config:{name}", domain="config", text=_clean(render(name, entries))))
    return views


def _parse(text: str) -> ast.Module:
    with warnings.catch_warnings():  # invalid escapes in other people's strings
        warnings.simplefilter("ignore")
        return ast.parse(text)


def _docstrings(tree: ast.Module) -> Iterator[tuple[str, str]]:
    module = ast.get_docstring(tree)
    if module:
        yield "Overview", module
    for title, node in _definitions(tree):
        doc = ast.get_docstring(node)
        if doc:
            yield title, doc


Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _definitions(tree: ast.Module) -> Iterator[tuple[str, Definition]]:
    """Classes, functions and methods with dotted titles, in source order."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name, node
            for inner in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    yield f"{node.name}.{inner.name}", inner


def _interface(tree: ast.Module, name: str) -> Iterator[dict[str, Any]]:
    """One flat record for every public class, function and method."""
    for title, node in _definitions(tree):
        if title.rpartition(".")[2].startswith("_"):
            continue
        record: dict[str, Any] = {"name": title, "line": node.lineno}
        if isinstance(node, ast.ClassDef):
            record["kind"] = "class"
            record["bases"] = [ast.unparse(base) for base in node.bases]
        else:
            record["kind"] = "method" if "." in title else "function"
            record["arguments"] = ast.unparse(node.args)
        doc = (ast.get_docstring(node) or "").partition("\n")[0]
        if doc:
            record["summary"] = doc
        yield record


def _as_json(name: str, entries: list[dict[str, Any]]) -> str:
    return json.dumps({"module": name, "entries": entries}, indent=2, ensure_ascii=False)


def _as_ini(name: str, entries: list[dict[str, Any]]) -> str:
    sections = [f"[{entry['name']}]\n" + "\n".join(f"{key} = {_plain(value)}" for key, value in entry.items()
                                                   if key != "name") for entry in entries]  # fmt: skip
    return f"# {name}\n\n" + "\n\n".join(sections)


def _plain(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)


def _without_shared_blocks(train: Iterable[Document], held_out: Iterable[Document]) -> Iterator[Document]:
    """Training documents without paragraphs that were held out or came before."""
    seen = {block for document in held_out for block in _blocks(document.text)}
    for document in train:
        kept = []
        for block in document.text.split("\n\n"):
            key = " ".join(block.split())
            if len(key) >= SHARED_BLOCK:
                # Views of one file repeat its text on purpose; only what was held out leaves them.
                if key in seen and document.domain in ("code", "prose", "reference"):
                    continue
                if document.domain in ("code", "prose", "reference"):
                    seen.add(key)
            kept.append(block)
        text = "\n\n".join(kept).strip("\n")
        if text:
            yield Document(name=document.name, domain=document.domain, text=text + "\n")


def _blocks(text: str) -> Iterator[str]:
    for block in text.split("\n\n"):
        key = " ".join(block.split())
        if len(key) >= SHARED_BLOCK:
            yield key
