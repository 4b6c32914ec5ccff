"""The house's walls: who may import whom, no cycles, no vague names, no file that has outgrown its purpose."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("qconvert", "reference_model", "calibration")
MAX_LINES = 400
VAGUE = {"utils", "helpers", "common", "misc"}

# Rooms by the longest matching prefix; what each may import besides itself.
ALLOWED: dict[str, set[str]] = {
    "reference_model": set(),
    "reference_model.config": set(),
    "reference_model.load": set(),
    "reference_model.presets": set(),
    "reference_model.config_fields": set(),
    "reference_model.config_fold": set(),
    "qconvert.core": set(),
    "qconvert.arch": {
        "qconvert.core", "reference_model.config", "reference_model.presets", "reference_model.config_fields",
    },
    "qconvert.io": {"qconvert.core"},
    "qconvert.numerics": {"qconvert.core"},
    "qconvert.transform": {"qconvert.core", "qconvert.arch", "reference_model.config"},
    "qconvert.formats": {"qconvert.core", "qconvert.arch", "qconvert.numerics.packing"},
    "qconvert.quantized_view": {
        "qconvert.core", "qconvert.arch", "qconvert.io", "qconvert.transform", "qconvert.formats",
        "reference_model.config",
    },
    "qconvert.plan": {
        "qconvert.core", "qconvert.arch", "qconvert.io", "qconvert.transform", "qconvert.formats",
        "qconvert.quantized_view", "reference_model.config", "reference_model.config_fold",
    },
    "qconvert.column_order": {"qconvert.core", "qconvert.io", "qconvert.formats"},
    "qconvert.exact_scales": {
        "qconvert.core", "qconvert.io", "qconvert.formats", "qconvert.encode", "qconvert.matrix_reader",
    },
    "qconvert.largest_values": {
        "qconvert.core", "qconvert.matrix_reader", "qconvert.numerics.finite", "qconvert.plan.row_blocks",
    },
    "qconvert.matrix_reader": {"qconvert.core", "qconvert.io", "qconvert.formats"},
    "qconvert.encode": {"qconvert.core", "qconvert.transform", "qconvert.numerics", "qconvert.formats"},
    "qconvert.mosaic": {
        "qconvert.core", "qconvert.io", "qconvert.plan", "qconvert.encode", "qconvert.formats", "qconvert.transform",
        "qconvert.numerics.finite", "qconvert.matrix_reader",
    },
    "qconvert.execute": {
        "qconvert.core", "qconvert.io", "qconvert.plan", "qconvert.encode", "qconvert.formats",
        "qconvert.numerics.finite", "qconvert.matrix_reader", "qconvert.largest_values", "qconvert.mosaic",
        "qconvert.matrices",
    },
    "qconvert.matrices": {
        "qconvert.core", "qconvert.plan", "qconvert.encode", "qconvert.formats", "qconvert.numerics.finite",
        "qconvert.transform.turns", "qconvert.matrix_reader", "qconvert.mosaic",
    },
    "qconvert.run": {
        "qconvert.core", "qconvert.io", "qconvert.matrix_reader", "qconvert.largest_values", "qconvert.execute",
        "qconvert.memory", "qconvert.numerics.threads",
    },
    "qconvert.memory": {"qconvert.core"},
    "qconvert.device": {"qconvert.core"},
    "qconvert.manifest": {"qconvert.core", "qconvert.io", "qconvert.execute"},
    "qconvert.manifest_reader": {"qconvert.core", "qconvert.io", "qconvert.manifest"},
    "qconvert.verify": {
        "qconvert.core", "qconvert.io", "qconvert.run", "qconvert.manifest", "qconvert.manifest_reader",
        "qconvert.device", "qconvert.memory", "qconvert.verify_source", "qconvert.rounding_by",
    },
    "qconvert.repeat": {
        "qconvert.core", "qconvert.io", "qconvert.plan", "qconvert.manifest", "qconvert.manifest_reader",
        "qconvert.onnx_export", "qconvert.rounding_by",
    },
    "qconvert.verify_source": {
        "qconvert.core", "qconvert.io", "qconvert.run", "qconvert.execute", "qconvert.manifest",
        "qconvert.manifest_reader", "qconvert.repeat", "qconvert.rounding_by", "qconvert.sequential.calibration",
    },
    "qconvert.onnx_export": {
        "qconvert.core", "qconvert.arch", "qconvert.io", "qconvert.transform", "qconvert.formats", "qconvert.plan",
        "qconvert.run", "qconvert.carry_out", "qconvert.column_order", "qconvert.memory", "qconvert.quantized_view",
        "qconvert.exact_scales", "qconvert.weights", "qconvert.manifest", "qconvert.manifest_reader",
        "reference_model.config",
        "reference_model.config_fields", "reference_model.rope", "reference_model.vision", "reference_model.positions",
    },
    "qconvert.rounding_by": {
        "qconvert.core", "qconvert.io", "qconvert.plan.weighing", "qconvert.execute", "qconvert.run",
        "qconvert.sequential", "qconvert.weights.boundaries", "qconvert.weights.source",
    },
    "qconvert.carry_out": {
        "qconvert.core", "qconvert.io", "qconvert.run", "qconvert.execute", "qconvert.manifest", "qconvert.memory",
        "qconvert.device", "qconvert.rounding_by", "qconvert.weights.boundaries",
    },
    "qconvert.convert": {
        "qconvert.core", "qconvert.io", "qconvert.plan", "qconvert.run", "qconvert.carry_out", "qconvert.column_order",
        "qconvert.exact_scales", "qconvert.engine_check", "qconvert.memory", "qconvert.rounding_by",
    },
    "qconvert.sequential": {
        "qconvert.core", "qconvert.arch", "qconvert.io", "qconvert.numerics", "qconvert.formats", "qconvert.plan",
        "qconvert.encode", "qconvert.execute", "qconvert.largest_values", "qconvert.matrix_reader", "qconvert.run",
        "qconvert.weights", "reference_model",
    },
    "qconvert.weights": {
        "qconvert.core", "qconvert.arch", "qconvert.io", "qconvert.transform", "qconvert.formats",
        "qconvert.quantized_view", "qconvert.numerics.rounding",
        "reference_model.load", "reference_model.config",
    },
    "qconvert.engine_check": {
        "qconvert.core", "qconvert.arch", "qconvert.io", "qconvert.formats", "qconvert.quantized_view",
        "reference_model.config", "reference_model.config_fold",
    },
    "qconvert.texts": {"qconvert.core", "qconvert.io"},
    "calibration": {
        "qconvert.core", "qconvert.arch", "qconvert.io", "qconvert.numerics", "qconvert.texts", "qconvert.weights",
        "reference_model",
    },
    "qconvert.parity": {
        "qconvert.core", "qconvert.arch", "qconvert.io", "qconvert.numerics", "qconvert.formats",
        "qconvert.quantized_view", "qconvert.plan.policy", "qconvert.texts", "qconvert.weights", "qconvert.memory",
        "reference_model",
        "qconvert.onnx_export.runtime", "qconvert.onnx_export.session", "qconvert.onnx_export.package_weights",
    },
    "qconvert.budget": {
        "qconvert.core", "qconvert.arch", "qconvert.io", "qconvert.formats", "qconvert.plan", "qconvert.weights",
        "qconvert.memory", "qconvert.parity",
    },
    "qconvert.budget.knapsack": set(),
    "qconvert.pytest_plugin": {"qconvert.core", "qconvert.io", "qconvert.parity"},
    "qconvert.cli": {"qconvert", "reference_model", "calibration"},
    "qconvert": set(),
}  # fmt: skip


@cache
def modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def imports(name: str, path: Path) -> set[str]:
    """Our own modules that a file imports anywhere, in functions and under TYPE_CHECKING too."""
    known = set(modules())
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
                base = ".".join([*parts[: len(parts) - node.level + 1], *([base] if base else [])])
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                found.add(whole if whole in known else base)
    return found


def within(module: str, room: str) -> bool:
    return module == room or module.startswith(room + ".")


def room_of(module: str) -> str:
    return max((room for room in ALLOWED if within(module, room)), key=len)


def ours(module: str) -> bool:
    return module.split(".")[0] in PACKAGES


@pytest.mark.parametrize("name", modules())
def test_a_module_imports_only_what_its_room_may(name: str) -> None:
    room = room_of(name)
    own = "reference_model" if room.startswith("reference_model") else room
    for module in filter(ours, imports(name, modules()[name])):
        if module == "qconvert" and name.startswith(("qconvert.", "calibration.")):
            continue  # the version
        allowed = within(module, own) or any(within(module, other) for other in ALLOWED[room])
        assert allowed, f"{name} imports {module}, which {room} may not"


def test_nobody_imports_the_command_line() -> None:
    for name, path in modules().items():
        if not within(name, "qconvert.cli"):
            assert not any(within(module, "qconvert.cli") for module in imports(name, path)), name


@pytest.mark.parametrize("name", [name for name in modules() if name.startswith("reference_model")])
def test_the_reference_model_needs_torch_and_the_standard_library_only(name: str) -> None:
    import sys

    for module in imports(name, modules()[name]):
        top = module.split(".")[0]
        assert top in {"torch", "reference_model"} or top in sys.stdlib_module_names, f"{name} imports {module}"


def test_there_are_no_cycles() -> None:
    graph = {name: {m for m in imports(name, path) if m in modules()} for name, path in modules().items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name in done:
            return
        for other in graph[name]:
            if other != "qconvert":
                visit(other, (*trail, name))
        done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("name", modules())
def test_a_file_is_small_and_named_after_its_purpose(name: str) -> None:
    assert name.split(".")[-1] not in VAGUE
    assert len(modules()[name].read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_only_the_console_catches_everything() -> None:
    for name, path in modules().items():
        if name == "qconvert.cli.console":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            # Cleaning up and raising again catches nothing.
            if isinstance(node, ast.ExceptHandler) and ast.unparse(node.body[-1]) != "raise":
                caught = ast.unparse(node.type) if node.type else "everything"
                assert caught not in {"everything", "Exception", "BaseException"}, f"{name}:{node.lineno}"


def test_asserts_are_for_tests() -> None:
    for name, path in modules().items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert not any(isinstance(node, ast.Assert) for node in ast.walk(tree)), name
