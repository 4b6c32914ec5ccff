"""The tables of docs/scale.md, from the numbers that were measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from qconvert.plan.policy import scheme_named
from reference_model.presets import PRESETS

from .growth import Conversion, Line, Planning, line_through
from .sizes import Inventory

SCHEMES = ("int4", "int8", "fp8", "fp8-block")
NAMES = {"35b-a3b": "35B-A3B", "122b-a10b": "122B-A10B", "397b-a17b": "397B-A17B"}


def page(text: str, numbers: Mapping[str, Any]) -> str:
    """``text`` with fresh content between the markers.

    Raises:
        ValueError: a marker is missing.
    """
    for name, write in SECTIONS.items():
        begin, end = f"<!-- {name}: written by benchmarks/bench_scale.py -->", f"<!-- end of {name} -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"the page should have {begin!r} and after it {end!r}")
        text = f"{before}{begin}\n\n{write(numbers)}\n\n{end}{after}"
    return text


def conversions(numbers: Mapping[str, Any], key: str = "conversions") -> list[Conversion]:
    """The measured conversions, by layers."""
    return sorted((Conversion(**one) for one in numbers[key]), key=lambda one: one.layers)


def time_line(measured: Sequence[Conversion]) -> Line:
    """Seconds by bytes of input."""
    return line_through([(one.input_bytes, one.wall) for one in measured])


def memory_line(measured: Sequence[Conversion]) -> Line:
    """Peak bytes by steps."""
    return line_through([(one.steps, one.peak_rss) for one in measured])


def _machine(numbers: Mapping[str, Any]) -> str:
    about = numbers["machine"]
    largest = conversions(numbers)[-1]
    moved = (largest.input_bytes + largest.output_bytes) / largest.floor / 1e9
    return (
        f"{about['processor']}, {about['cores']} cores, {about['memory'] / 1e9:.0f} GB of memory, {about['system']}; "
        f"load before the start {about['load_before']:.1f}. The disk alone, reading the largest input while the bytes "
        f"of its output are written and fsynced, moves {moved:.2f} GB/s, both directions together."
    )


def _conversions(numbers: Mapping[str, Any]) -> str:
    measured = conversions(numbers)
    time, memory = time_line(measured), memory_line(measured)
    miss = time.largest_miss([(one.input_bytes, one.wall) for one in measured])
    rows = [
        (
            str(one.layers), _gb(one.input_bytes), _gb(one.output_bytes), f"{one.wall:.1f} s",
            f"{one.input_bytes / one.wall / 1e9:.2f} GB/s", f"{one.cpu:.1f} s", _mb(one.peak_rss), _gb(one.disk_read),
            _gb(one.disk_written), f"{one.floor:.1f} s", f"{one.wall / one.floor:.2f}",
        )
        for one in measured
    ]  # fmt: skip
    head = (
        "layers", "input", "output", "wall", "input a second", "CPU", "peak RSS", "read from disk", "written",
        "disk alone", "wall / disk alone",
    )  # fmt: skip
    between = measured[-1].peak_rss - measured[0].peak_rss
    largest, cores = measured[-1], numbers["machine"]["cores"]
    moved = (largest.disk_read + largest.disk_written) / largest.wall
    alone = (largest.input_bytes + largest.output_bytes) / largest.floor
    return (
        f"{_table(head, rows)}\n\nThe line of least squares is {time.fixed:.1f} s and {1 / time.slope / 1e9:.2f} GB of "
        f"input a second; no measurement is off it by more than {miss:.0%}. From {measured[0].layers} to "
        f"{measured[-1].layers} layers the peak of memory moves by {between / 1e6:+.0f} MB while the input grows "
        f"{measured[-1].input_bytes / measured[0].input_bytes:.1f} times: {memory.slope / 1e3:.1f} kB a step. "
        f"During the largest conversion the disk moves {moved / 1e9:.2f} GB/s, {moved / alone:.0%} of what it moves "
        f"alone, and the {cores} cores are busy for {largest.cpu / largest.wall / cores:.0%} of the time."
    )


def _plans(numbers: Mapping[str, Any]) -> str:
    bare = numbers["bare"]["peak_rss"]
    plans = [Planning(**one) for one in numbers["plans"]]
    pairs: dict[tuple[str, bool, int], dict[bool, Planning]] = {}
    for one in plans:
        pairs.setdefault((one.size, one.per_expert, one.shards), {})[one.json] = one
    rows = [
        (
            NAMES.get(size, size), "one by one" if per_expert else "stacked", str(shards), f"{pair[False].steps:,}",
            f"{pair[False].wall:.1f} s", f"+{_mb(pair[False].peak_rss - bare)}", f"{pair[True].wall:.1f} s",
            f"+{_mb(pair[True].peak_rss - bare)}",
        )
        for (size, per_expert, shards), pair in pairs.items()
    ]  # fmt: skip
    head = ("", "experts in the source", "files", "steps", "plan", "memory", "plan as JSON", "memory")
    slopes = {
        json: line_through(
            [(one.steps, one.peak_rss) for one in plans if one.json is json and not one.per_expert]
        ).slope
        for json in (False, True)
    }
    return (
        f"{_table(head, rows)}\n\nMemory is what comes on top of a process that only prints its help, "
        f"{_mb(bare)}. A step takes {slopes[False] / 1e3:.1f} kB, and {slopes[True] / 1e3:.1f} kB where the plan is "
        "printed as JSON."
    )


def _many(numbers: Mapping[str, Any]) -> str:
    few, many = conversions(numbers, "many")
    more = many.steps - few.steps
    rows = [(f"{one.steps:,}", _gb(one.input_bytes), f"{one.wall:.1f} s", _mb(one.peak_rss)) for one in (few, many)]
    return (
        f"{_table(('steps', 'input', 'wall', 'peak RSS'), rows)}\n\nA step that has next to nothing to do takes "
        f"{(many.wall - few.wall) / more * 1e3:.2f} ms and leaves {(many.peak_rss - few.peak_rss) / more / 1e3:.1f} kB."
    )


def _forecast(numbers: Mapping[str, Any]) -> str:
    measured = conversions(numbers)
    time, alone = time_line(measured), line_through([(one.input_bytes, one.floor) for one in measured])
    few, many = conversions(numbers, "many")
    per_step = (many.peak_rss - few.peak_rss) / (many.steps - few.steps)
    largest = measured[-1]
    rows = []
    for key, name in NAMES.items():
        found = Inventory.of(PRESETS[key])
        sizes = [found.output_bytes(scheme_named(scheme)) for scheme in SCHEMES]
        memory = largest.peak_rss + per_step * (found.matrices - largest.steps)
        rows.append(
            (
                name, _gb(found.source_bytes), *map(_gb, sizes), _gb(found.source_bytes + sizes[0]),
                _duration(time(found.source_bytes)), _duration(alone(found.source_bytes)), _mb(memory),
            )
        )  # fmt: skip
    head = ("", "BF16", *SCHEMES, "disk, BF16 and int4", "time, int4", "disk alone", "memory, int4")
    return _table(head, rows)


SECTIONS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "machine": _machine,
    "conversions": _conversions,
    "many steps": _many,
    "plans": _plans,
    "forecast": _forecast,
}


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _gb(count: float) -> str:
    return f"{count / 1e9:,.2f} GB" if count < 1e11 else f"{count / 1e9:,.0f} GB"


def _mb(count: float) -> str:
    return f"{count / 1e6:,.0f} MB"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
