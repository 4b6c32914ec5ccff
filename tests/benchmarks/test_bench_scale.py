"""What docs/scale.md says follows from what was measured, and what was measured follows from true shapes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.make_synthetic import SIZES, make_holes, shrink
from benchmarks.make_synthetic import config_json as as_json
from benchmarks.scale.growth import Line, line_through
from benchmarks.scale.page import SCHEMES, SECTIONS, page
from benchmarks.scale.sizes import Inventory
from qconvert.convert import plan_conversion
from qconvert.core.plan import Quantize
from qconvert.io.checkpoint import Checkpoint
from qconvert.plan.policy import default_policy, scheme_named
from reference_model.presets import PRESETS

ROOT = Path(__file__).parents[2]


def test_a_line_through_points_of_a_line_is_that_line() -> None:
    line = line_through([(x, 3.0 + 0.5 * x) for x in (1.0, 2.0, 4.0, 8.0)])
    assert math.isclose(line.fixed, 3.0)
    assert math.isclose(line.slope, 0.5)


def test_no_other_line_has_smaller_squares() -> None:
    points = [(1.0, 2.0), (2.0, 2.5), (4.0, 7.0), (8.0, 9.0)]

    def squares(line: Line) -> float:
        return sum((line(x) - y) ** 2 for x, y in points)

    best = line_through(points)
    for fixed, slope in ((0.01, 0.0), (-0.01, 0.0), (0.0, 0.01), (0.0, -0.01)):
        assert squares(Line(best.fixed + fixed, best.slope + slope)) > squares(best)


def test_the_largest_miss_is_a_part_of_what_was_measured() -> None:
    assert math.isclose(Line(0.0, 1.0).largest_miss([(1.0, 1.0), (2.0, 4.0), (3.0, 2.0)]), 0.5)


def test_one_place_is_no_line() -> None:
    with pytest.raises(ValueError, match="two places"):
        line_through([(1.0, 2.0), (1.0, 3.0)])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("per_expert", [False, True])
def test_bytes_by_shapes_are_those_of_the_plan(tmp_path: Path, scheme: str, per_expert: bool) -> None:
    config = shrink(SIZES["tiny"], 4, mtp=True, vision=False)
    nbytes = make_holes(tmp_path / "src", config, as_json(config), per_expert=per_expert, shard_bytes=1_000_000)
    plan = plan_conversion(tmp_path / "src", default_policy(scheme_named(scheme)))
    found = Inventory.of(config)
    assert found.source_bytes == nbytes
    assert found.matrices == sum(isinstance(step.action, Quantize) for step in plan.steps)
    assert found.output_bytes(scheme_named(scheme)) == plan.layout.nbytes


def test_checkpoints_of_holes_take_no_disk(tmp_path: Path) -> None:
    config = PRESETS["35b-a3b"]
    nbytes = make_holes(tmp_path / "src", config, as_json(config), shard_bytes=4_000_000_000)
    files = list((tmp_path / "src").glob("*.safetensors"))
    assert sum(path.stat().st_size for path in files) > nbytes > 70e9
    assert sum(path.stat().st_blocks * 512 for path in files) < 2e6
    with Checkpoint.open(tmp_path / "src") as checkpoint:
        assert sum(info.nbytes for info in checkpoint.tensors.values()) == nbytes
    with pytest.raises(FileExistsError):
        make_holes(tmp_path / "src", config, as_json(config))


def conversion(layers: int, **other: float) -> dict[str, Any]:
    """Two seconds and half a gigabyte a second; one kilobyte a step."""
    size = layers * 1_000_000_000
    return {
        "layers": layers, "steps": layers * 100, "input_bytes": size, "output_bytes": size // 4,
        "wall": 2.0 + size / 0.5e9, "cpu": 1.0, "peak_rss": 300_000_000 + layers * 100_000,
        "disk_read": size, "disk_written": size, "floor": 1.0 + size / 1e9, **other,
    }  # fmt: skip


NUMBERS: dict[str, Any] = {
    "machine": {"processor": "P", "cores": 2, "memory": 8e9, "system": "S", "load_before": 0.0},
    "bare": {"wall": 1.0, "peak_rss": 200_000_000},
    "plans": [
        {"size": size, "per_expert": False, "shards": 3, "steps": steps, "json": json, "wall": 1.0,
         "peak_rss": 200_000_000 + steps * 2000}
        for size, steps in (("35b-a3b", 1000), ("397b-a17b", 3000)) for json in (False, True)
    ],
    "many": [conversion(2), conversion(12)],
    "conversions": [conversion(layers) for layers in (8, 1, 4, 2)],
}  # fmt: skip
EMPTY = "".join(f"<!-- {name}: written by benchmarks/bench_scale.py -->\n<!-- end of {name} -->\n" for name in SECTIONS)


def test_a_page_says_what_the_numbers_give() -> None:
    text = page(EMPTY, NUMBERS)
    assert "is 2.0 s and 0.50 GB of input a second; no measurement is off it by more than 0%" in text
    assert "+1 MB while the input grows 8.0 times: 1.0 kB a step" in text
    assert "A step takes 2.0 kB" in text
    seconds = 2 + Inventory.of(PRESETS["35b-a3b"]).source_bytes / 0.5e9
    assert f"{seconds / 60:.0f} min |" in text
    assert page(text, NUMBERS) == text
    widths = [{line.count("|") for line in part.splitlines()} for part in text.split("\n\n") if part.startswith("|")]
    assert all(len(width) == 1 for width in widths)


def test_a_page_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="many steps"):
        page(EMPTY.replace("end of many steps", ""), NUMBERS)


def test_the_page_is_that_of_the_numbers() -> None:
    numbers = json.loads((ROOT / "docs" / "scale.json").read_text(encoding="utf-8"))
    text = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    assert page(text, numbers) == text
    assert numbers["size"] == "35b-a3b"
