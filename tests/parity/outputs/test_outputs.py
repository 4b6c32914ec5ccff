"""Every output says what the report says, and no name in a checkpoint can make it say anything else."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as Xml

import jsonschema
import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from qconvert.core.metric import Verdict, exact
from qconvert.parity.outputs import folder
from qconvert.parity.outputs.document import SCHEMA, as_document
from qconvert.parity.outputs.folder import write_report
from qconvert.parity.outputs.junit import as_junit
from qconvert.parity.outputs.markdown import as_markdown
from qconvert.parity.outputs.model_card import as_model_card
from qconvert.parity.outputs.page import as_page, heat_map
from qconvert.parity.outputs.pictures import HEIGHT, LEFT, RIGHT, WIDTH, axis, chart
from qconvert.parity.outputs.sections import deciding, headlines, printable
from qconvert.parity.report import ParityReport
from tests.parity.outputs.reports import HOSTILE, bare_report, full_report, hostile_report

REPORTS = {"full": full_report(), "hostile": hostile_report(), "bare": bare_report()}
SCHEMA_FILE = Path(folder.__file__).with_name("parity.schema.json")


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    read: dict[str, Any] = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(read)
    return read


@pytest.mark.parametrize("name", REPORTS)
def test_what_is_written_fits_the_schema(name: str, schema: dict[str, Any], tmp_path: Path) -> None:
    path, *_ = write_report(REPORTS[name], tmp_path)
    document = json.loads(path.read_bytes(), parse_constant=lambda word: pytest.fail(word))
    jsonschema.Draft202012Validator(schema).validate(document)
    assert document == as_document(REPORTS[name])
    assert document["schema"] == SCHEMA == schema["properties"]["schema"]["const"]
    assert document["because"] == REPORTS[name].because


def test_the_schema_knows_every_key_and_lets_no_other_in(schema: dict[str, Any]) -> None:
    document = as_document(REPORTS["full"])
    assert set(document) == set(schema["properties"]) == set(schema["required"])
    for path in (
        (),
        ("metrics", 0),
        ("tensors", 0),
        ("curves", 0),
        ("experts", 0),
        ("roles", 0),
        ("attribution", "layers", 0),
    ):
        broken = json.loads(json.dumps(document))
        at = broken
        for key in path:
            at = at[key]
        at["more"] = 1
        assert not jsonschema.Draft202012Validator(schema).is_valid(broken), path


def test_files_appear_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(REPORTS["full"], tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(before) == ["junit.xml", "model-card.md", "parity.json", "parity.md", "policy.toml", "report.html"]
    renamed: list[str] = []

    def fail(self: Path, target: Path) -> None:
        renamed.append(target.name)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(folder.OutputError, match="No space left"):
        write_report(REPORTS["hostile"], tmp_path)
    assert renamed == ["parity.json"]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


class Page(HTMLParser):
    """What a browser would make of a page: elements with their attributes, and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.said: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in {"meta", "path"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in {"script", "style"}:
            self.said.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.mark.parametrize("name", REPORTS)
def test_the_page_is_sound_and_needs_no_network(name: str) -> None:
    page = Page(as_page(REPORTS[name]))
    assert page.open == []
    assert not {"img", "link", "iframe", "object", "embed", "form", "base"} & {tag for tag, _ in page.elements}
    assert len(page.all("script")) == len(page.all("style")) == 1
    for _, attributes in page.elements:
        assert not {"src", "srcset", "style"} & set(attributes)
        assert not any(key.startswith("on") for key in attributes)
        assert (attributes.get("href") or "#").startswith("#")
    (policy,) = [one["content"] for one in page.all("meta") if "http-equiv" in one]
    assert policy is not None and policy.startswith("default-src 'none'; style-src 'sha256-")


@pytest.mark.parametrize("name", REPORTS)
def test_the_page_can_be_read_without_eyes_and_without_a_mouse(name: str) -> None:
    page = Page(as_page(REPORTS[name]))
    tags = [tag for tag, _ in page.elements]
    assert [tags.count(tag) for tag in ("header", "main", "h1", "footer", "nav")] == [1] * 5
    assert page.all("html") == [{"lang": "en"}]
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        for key in ("aria-labelledby",):
            assert set((attributes.get(key) or "").split()) <= set(ids)
        if (target := attributes.get("href")) is not None:
            assert target[1:] in ids
        if "tabindex" in attributes and attributes.get("role") == "region":
            assert attributes["aria-label"]
    assert tags.count("caption") == tags.count("table")
    assert all("scope" in one for one in page.all("th"))
    assert all(one["role"] == "img" and one["aria-labelledby"] for one in page.all("svg"))
    assert tags.count("title") == tags.count("svg") + 1 and tags.count("desc") == tags.count("svg")
    levels = [int(tag[1]) for tag in tags if re.fullmatch("h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_the_summary_comes_first_and_everything_is_there() -> None:
    page = Page(as_page(REPORTS["full"]))
    sections = [one["id"] for one in page.all("section")]
    assert sections == [
        "summary", "causes", "layers", "attribution", "heat", "experts", "curves", "parts", "tensors",
    ]  # fmt: skip
    assert REPORTS["full"].because in page.said
    assert len(page.all("svg")) == 8
    assert [one["id"] for one in Page(as_page(REPORTS["bare"])).all("section")] == ["summary", "causes"]


def test_hostile_names_are_text_on_the_page() -> None:
    page = Page(as_page(REPORTS["hostile"]))
    said = "".join(page.said)
    for name in HOSTILE[:-2]:
        assert name in said


def tokens_of(text: str) -> list[Any]:
    """What a Markdown reader makes of ``text``."""
    reader = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    return [inner for token in reader.parse(text) for inner in (token, *(token.children or ()))]


@pytest.mark.parametrize("name", REPORTS)
def test_hostile_names_are_text_in_markdown(name: str) -> None:
    for text in (as_markdown(REPORTS[name]), as_model_card(REPORTS[name], name).split("---\n", 2)[2]):
        assert not re.search(r"\w://|www\.|@", text)  # GitHub makes links and mentions of them
        tokens = tokens_of(text)
        kinds = {token.type for token in tokens}
        assert not kinds & {"link_open", "image", "em_open", "s_open", "fence", "code_block", "hr", "blockquote_open"}
        html = [token.content for token in tokens if token.type in {"html_inline", "html_block"}]
        allowed = r"(</?(code|details)>|</?details><summary>[^<>]*</summary>|\s)*"
        assert all(re.fullmatch(allowed, one) for one in html), html
        tables = [block for block in text.split("\n\n") if block.startswith("| ")]
        assert len(tables) == sum(token.type == "table_open" for token in tokens)
        for table in tables:
            assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.strip().split("\n")}) == 1


def test_markdown_begins_with_the_verdict_and_why() -> None:
    lines = as_markdown(REPORTS["full"]).splitlines()
    assert lines[0].startswith("# Parity: pass")
    assert lines[2].startswith("No fault was found and the limit holds")


@pytest.mark.parametrize("name", REPORTS)
def test_junit_has_one_case_for_each_limit_and_cause(name: str) -> None:
    report = REPORTS[name]
    root = Xml.fromstring(as_junit(report))
    cases = root.findall("testsuite/testcase")
    limits = deciding(report)
    assert len(cases) == max(1, len(limits) + len(report.causes) + len(report.unjudged))
    assert len({(case.get("classname"), case.get("name")) for case in cases}) == len(cases)
    failed = sum(one.verdict is not Verdict.PASS for one in limits)
    errors = sum(one.severity.value == "error" for one in report.causes)
    counts = {"tests": len(cases), "failures": failed, "errors": errors, "skipped": len(report.unjudged)}
    for element in (root, root.find("testsuite")):
        assert element is not None
        assert {key: int(element.get(key, "-1")) for key in counts} == counts
    if name == "hostile":
        names = {str(case.get("name")) for case in cases}
        assert all(f"sqnr_min of {printable(one)}" in names for one in HOSTILE)


@pytest.mark.parametrize("name", REPORTS)
def test_a_model_card_is_read_by_the_hub(name: str) -> None:
    title = HOSTILE[-1] if name == "hostile" else "org/model"
    text = as_model_card(REPORTS[name], title)
    front = yaml.safe_load(text.split("\n---\n", 1)[0].removeprefix("---\n"))
    assert front["model-index"][0]["name"] == title
    if REPORTS[name].metrics:
        card = ModelCard(text, ignore_metadata_errors=False)
        values = {one.metric_type: one.metric_value for one in card.data.eval_results}
        assert values["kl_mean"] == REPORTS[name].metric("kl_mean", "as served").value
        assert all(math.isfinite(value) for value in values.values())


def test_colours_of_the_heat_map_run_from_worst_to_best() -> None:
    found = heat_map(REPORTS["full"])
    assert found is not None
    assert found.roles == ("text.expert.down", "text.expert.gate", "text.expert.up")
    cells = [cell for _, row in found.rows for cell in row if cell is not None]
    assert len(found.rows) == 4 and len(cells) == 12
    ordered = [step for _, step in sorted(cells, key=lambda cell: float(cell[0]))]
    assert ordered == sorted(ordered)
    assert (min(ordered), max(ordered)) == (0, 7)
    assert heat_map(REPORTS["bare"]) is None


def test_small_differences_have_close_colours() -> None:
    one = REPORTS["full"].tensors[0]
    found = heat_map(replace(REPORTS["full"], tensors=(one,)))
    assert found is not None
    assert [cell for _, row in found.rows for cell in row] == [(found.high, 7)]
    # twice the noise is 3 dB, and that is all of the colours
    louder = replace(one.sums, squared_error=one.sums.squared_error * 1.1)
    other = replace(one, role=replace(one.role, layer=(one.role.layer or 0) + 1), sums=louder)
    found = heat_map(replace(REPORTS["full"], tensors=(one, other)))
    assert found is not None
    assert sorted(cell[1] for _, row in found.rows for cell in row if cell is not None) == [6, 7]
    assert float(found.worst) == pytest.approx(float(found.high) - 3, abs=0.11)
    assert float(found.low) > float(found.worst)


def test_nan_is_shown_and_takes_the_worst_colour() -> None:
    found = heat_map(REPORTS["hostile"])
    assert found is not None
    assert found.rows[0][1] == (("nan", 0),)


@pytest.mark.parametrize("values", [[1.0], [0.0, 0.0], [-3.0, 7.5], [1e-6, 1.0], [0.0, 1e-6, 1.0], [5.0, 5.1], []])
def test_an_axis_spans_its_values(values: list[float]) -> None:
    found = axis("x", values)
    shown = [value for value in values if value > 0 or not found.log]
    assert all(-1e-9 <= found.share(value) <= 1 + 1e-9 for value in shown)
    assert all(-1e-9 <= found.share(value) <= 1 + 1e-9 for value, _ in found.ticks)
    assert 2 <= len(found.ticks) <= 12
    assert found.log == (bool(values) and min(values) >= 0 and 1e-6 in values)


@pytest.mark.parametrize("values", [[0.99985, 0.99998], [31.672, 31.777], [1000.5, 1000.9], [0.9, 0.97], [-3.0, 7.5]])
def test_no_two_ticks_say_the_same(values: list[float]) -> None:
    ticks = axis("x", values).ticks
    assert len({text for _, text in ticks}) == len(ticks)
    step = ticks[1][0] - ticks[0][0]
    assert all(float(text) == pytest.approx(value, abs=step / 100) for value, text in ticks)


def test_the_tail_of_a_distribution_has_room() -> None:
    shares = [0.0, 50.0, 90.0, 99.0, 99.9, 100.0]
    found = chart("t", "share", "KL", [("a", [(x, 10 ** (x / 50)) for x in shares])], evenly=True)
    places = [float(at.split()[0]) for at in found.lines[0].path[1:].split("L")]
    assert places == pytest.approx([place for place, _ in found.x_ticks])
    assert [text for _, text in found.x_ticks] == ["0", "50", "90", "99", "99.9", "100"]
    gaps = [after - before for before, after in pairwise(places)]
    assert max(gaps) - min(gaps) < 0.5
    assert chart("t", "x", "y", [("a", [])], evenly=True).description == "y: nothing finite to draw."


def test_charts_of_layers_say_what_they_show() -> None:
    numbers = tuple(exact("kl_lens", "as served", 1e-4 * at, "nats", layer=at) for at in range(3))
    page = as_page(replace(REPORTS["full"], metrics=numbers))
    assert "KL lens by layer" in page
    assert "if they ended after the layer" in page


def test_drafts_are_among_the_numbers_that_most_readers_want() -> None:
    names = ("draft_acceptance_original", "draft_acceptance_converted")
    numbers = tuple(exact(name, "as served", 0.5, "fraction", better="high") for name in names)
    report = replace(REPORTS["full"], metrics=numbers)
    assert [name for name, _ in headlines(report)] == list(names)


def test_there_is_no_tick_between_two_layers() -> None:
    assert [text for _, text in axis("layer", [0.0, 1.0, 2.0]).ticks] == ["0", "1", "2"]


def test_a_chart_leaves_out_what_has_no_place_and_says_what_it_shows() -> None:
    found = chart("t", "layer", "error", [("a", [(0.0, 1.0), (1.0, math.nan), (2.0, 3.0), (3.0, math.inf)])])
    assert found.lines[0].points == ((0.0, 1.0), (2.0, 3.0))
    places = [tuple(map(float, at.split())) for at in found.lines[0].path[1:].split("L")]
    assert places[0][0] == LEFT and places[1][0] == WIDTH - RIGHT
    assert 0 < places[1][1] < places[0][1] < HEIGHT
    assert found.description == "error. a: from 1 at 0 to 3 at 2."
    assert chart("t", "x", "y", [("a", [])]).description == "y: nothing finite to draw."


def test_a_report_of_a_large_model_stays_small() -> None:
    layer = [exact("hidden_error", f"as served, {i}", 0.1, layer=at) for i in range(6) for at in range(60)]
    report: ParityReport = replace(REPORTS["full"], metrics=tuple(layer), tensors=REPORTS["full"].tensors * 800)
    assert len(as_page(report)) < 2_000_000
    assert len(as_markdown(report)) < 1_000_000  # what GitHub takes for a job's summary
