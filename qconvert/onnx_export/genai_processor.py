"""How onnxruntime-genai shall prepare images: what the checkpoint says of it, in its terms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qconvert.core.errors import PlanError
from qconvert.io.source_folder import GENAI_PROCESSOR, read_whole
from qconvert.io.strict_json import parse_object
from qconvert.onnx_export.pictures import IMAGE_PROCESSOR, WHOLE_PROCESSOR
from reference_model.config import VisionConfig

NO_PROCESSOR = (
    f"SRC has no {IMAGE_PROCESSOR} and no {WHOLE_PROCESSOR} with an image_processor, so the package has no "
    f"{GENAI_PROCESSOR}: onnxruntime-genai runs text with it, and images whose pixels it is given"
)


def genai_processor(config: VisionConfig, source: Path) -> dict[str, Any] | None:
    """Steps from a picture's file to the rows of ``pixel_values``; ``None`` where the checkpoint does not tell them.

    Source: onnxruntime-extensions, ``image_transforms.hpp`` and ``image_transforms_qwen2_5.hpp``.

    Raises:
        PlanError: the patches are not those of the tower.
        SourceError: the file is damaged.
    """
    path, told = _processor(source)
    if told is None:
        return None
    sizes = {
        "patch_size": config.patch_size,
        "temporal_patch_size": config.temporal_patch_size,
        "merge_size": config.spatial_merge_size,
    }
    for name, size in sizes.items():
        if told.get(name, size) != size:
            raise PlanError(
                f"{path}: {name} is {told[name]}, but the vision tower of config.json has {size}: its images would not "
                "fit the tower. Correct the one that is wrong, or export with --no-vision"
            )
    for name in ("do_resize", "do_rescale", "do_normalize"):
        if told.get(name, True) is not True:
            raise PlanError(
                f"{path}: {name} is {told[name]!r}, and a package prepares images with all three: pixels would be "
                "others. Export with --no-vision"
            )
    least, most = _pixels(told, path)
    patches = {name: sizes[name] for name in ("patch_size", "merge_size")}
    steps: tuple[tuple[str, dict[str, Any]], ...] = (
        ("DecodeImage", {"color_space": "RGB"}),
        ("Resize", {"smart_resize": 1, "min_pixels": least, "max_pixels": most, **patches}),
        ("Rescale", {"rescale_factor": _number(told.get("rescale_factor", 1 / 255), "rescale_factor", path)}),
        ("Normalize", {"mean": _colours(told, "image_mean", path), "std": _colours(told, "image_std", path)}),
        ("PatchImage", sizes),
    )
    transforms = [{"operation": {"name": kind, "type": kind, "attrs": attributes}} for kind, attributes in steps]
    return {"processor": {"name": "qwen3_vl_image_processor", "transforms": transforms}}


def _processor(source: Path) -> tuple[Path, Mapping[str, Any] | None]:
    """What says how to prepare images: a file of its own, or a part of the one that newer transformers write."""
    path = source / IMAGE_PROCESSOR
    if path.is_file():
        return path, parse_object(read_whole(path), str(path))
    path = source / WHOLE_PROCESSOR
    found = parse_object(read_whole(path), str(path)).get("image_processor") if path.is_file() else None
    return path, found if isinstance(found, Mapping) else None


def _pixels(told: Mapping[str, Any], path: Path) -> tuple[int, int]:
    """The fewest and the most pixels of a picture, under their old names or the new ones."""
    size = told.get("size")
    block = size if isinstance(size, Mapping) else {}
    found = (
        block.get("shortest_edge", told.get("min_pixels")),
        block.get("longest_edge", told.get("max_pixels")),
    )
    least, most = found
    if type(least) is not int or type(most) is not int or not 0 < least <= most:
        raise PlanError(
            f"{path}: size is {size}, expected the fewest and the most pixels of a picture as shortest_edge and "
            "longest_edge"
        )
    return least, most


def _colours(told: Mapping[str, Any], name: str, path: Path) -> list[float]:
    found = told.get(name)
    if not isinstance(found, list) or len(found) != 3:
        raise PlanError(f"{path}: {name} is {found}, expected three numbers, of red, green and blue")
    return [_number(one, name, path) for one in found]


def _number(value: object, name: str, path: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise PlanError(f"{path}: {name} is {value!r}, expected a finite number")
    return float(value)
