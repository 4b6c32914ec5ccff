"""Packages with a vision tower show images: as the reference model, of every size, in every set of operators."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from qconvert.cli.demo import CHECKPOINT
from qconvert.core.errors import UsageError
from qconvert.io.source_folder import EMBEDDING_FILE, MODEL_FILE, VISION_FILE
from qconvert.onnx_export.embedder import Pictures
from qconvert.onnx_export.export import export_onnx
from qconvert.onnx_export.operator_sets import OPERATOR_SETS
from qconvert.onnx_export.runtime import Package
from qconvert.onnx_export.session import load
from qconvert.onnx_export.states import IMAGE_FEATURES, IMAGE_GRID, INPUT_IDS, INPUTS_EMBEDS, PIXEL_VALUES
from reference_model import multimodal
from reference_model.multimodal import MultimodalLM
from reference_model.positions import prompt_positions
from reference_model.vision import Grid
from tests.checkpoints import save_checkpoint
from tests.onnx_export.packages import EXACT, error, reference_of_images
from tests.reference_model.tiny_multimodal import Piece, Prompts, checkpoint, config_json, image, prompts, text, video
from tests.reference_model.tiny_multimodal import model as tiny_model
from tests.tolerances import tolerances

LIMITS = tolerances("onnx_export")

NAMES = tuple(one.name for one in OPERATOR_SETS)

GRIDS: dict[str, tuple[Grid, ...]] = {
    "one image": ((1, 4, 6),),
    "two images of different sizes": ((1, 2, 8), (1, 6, 4)),
    "the smallest, and one that is larger than the table": ((1, 2, 2), (1, 12, 10)),
    "videos": ((3, 4, 2), (1, 2, 4), (2, 2, 2)),
}

BATCH: tuple[tuple[Piece, ...], ...] = (
    (text(4), image(4, 6), text(2), image(2, 8), text(5)),
    (text(19),),
    (image(6, 2), video(2, 2, 4), text(3)),
)
"""Rows of different lengths, with two images, none, and an image beside a video."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "tiny"
    save_checkpoint(folder, config_json(), checkpoint())
    return folder


@pytest.fixture(scope="module")
def model() -> MultimodalLM:
    return tiny_model(checkpoint())


@pytest.fixture(scope="module", params=NAMES)
def package(request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Package:
    folder = tmp_path_factory.mktemp(request.param) / "package"
    export_onnx(source, folder, replace(EXACT, ops=request.param))
    return Package(folder, threads=1)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Package, MultimodalLM]:
    folder = tmp_path_factory.mktemp("demo") / "package"
    export_onnx(CHECKPOINT, folder, EXACT)
    return Package(folder, threads=1), reference_of_images(CHECKPOINT)


def seen(folder: Path, pixels: torch.Tensor, grids: tuple[Grid, ...]) -> np.ndarray:
    """What the tower alone makes of pictures."""
    feeds = {PIXEL_VALUES: pixels.numpy(), IMAGE_GRID: np.asarray(grids)}
    return load(folder / VISION_FILE, 1).run([IMAGE_FEATURES], feeds)[0]


def pixels_of(grids: tuple[Grid, ...], width: int) -> torch.Tensor:
    patches = sum(frames * rows * columns for frames, rows, columns in grids)
    return torch.randn(patches, width, generator=torch.Generator().manual_seed(len(grids)))


def pictures(given: multimodal.Pictures | None) -> Pictures | None:
    return None if given is None else Pictures(pixels=given.pixels.numpy(), grids=given.grids)


def both(given: Prompts) -> dict[str, Pictures | None]:
    return {name: pictures(one) for name, one in given.pictures.items()}


@pytest.mark.parametrize("grids", GRIDS)
def test_the_tower_is_the_references(package: Package, model: MultimodalLM, grids: str) -> None:
    pixels = pixels_of(GRIDS[grids], 54)
    expected = model.visual(pixels, GRIDS[grids]).numpy()
    assert error(seen(package.folder, pixels, GRIDS[grids]), expected) < LIMITS["fp32_vision"]


def test_the_demos_tower_is_the_references(demo: tuple[Package, MultimodalLM]) -> None:
    package, model = demo
    grids = ((1, 8, 4), (1, 4, 6), (1, 16, 16))
    pixels = pixels_of(grids, 1536)
    assert error(seen(package.folder, pixels, grids), model.visual(pixels, grids).numpy()) < LIMITS["fp32_vision"]


def test_norms_of_small_numbers_are_the_references(tmp_path: Path) -> None:
    tensors = checkpoint()
    for name in ("patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed.weight"):
        tensors[f"model.visual.{name}"] *= 1e-3  # then the first norm divides by its epsilon as well
    save_checkpoint(tmp_path / "source", config_json(), tensors)
    export_onnx(tmp_path / "source", tmp_path / "package", EXACT)
    grids = ((1, 4, 6),)
    pixels = pixels_of(grids, 54)
    expected = tiny_model(tensors).visual(pixels, grids).numpy()
    assert error(seen(tmp_path / "package", pixels, grids), expected) < LIMITS["fp32_vision"]


@pytest.mark.parametrize("package", ["contrib"], indirect=True)
@pytest.mark.parametrize("left", [False, True])
def test_positions_are_the_references(package: Package, left: bool) -> None:
    given = prompts(BATCH, left=left)
    grids = {"image_grids": given.grids("image"), "video_grids": given.grids("video")}
    expected = prompt_positions(package.config, given.ids, attention_mask=given.mask, **grids)
    found = package.positions(given.ids.numpy(), attention_mask=given.mask.numpy(), **both(given))
    assert np.array_equal(found, expected.numpy())


@pytest.mark.parametrize("left", [False, True])
def test_logits_of_a_mixed_batch_are_the_references_and_so_is_what_follows(
    package: Package, model: MultimodalLM, left: bool
) -> None:
    given = prompts(BATCH, left=left)
    ids, mask, real = given.ids.numpy(), given.mask.numpy(), given.mask.bool().numpy()
    expected = model(given.ids, attention_mask=given.mask, **given.pictures)
    found = package.forward(ids, attention_mask=mask, **both(given))
    assert error(found.logits[real], expected.logits.numpy()[real]) < LIMITS["fp32_logits"]
    for token in (7, 410):  # the second is that of an image, which is text where no pictures come with it
        step = torch.full((3, 1), token)
        expected = model(step, cache=expected.cache)
        found = package.forward(step.numpy(), cache=found.cache)
        assert error(found.logits, expected.logits.numpy()) < LIMITS["fp32_logits"]
    more = prompts([(text(2), image(4, 4), text(1))] * 3, seed=1)
    expected = model(more.ids, cache=expected.cache, **more.pictures)
    found = package.forward(more.ids.numpy(), cache=found.cache, **both(more))
    assert error(found.logits, expected.logits.numpy()) < LIMITS["fp32_logits"]


@pytest.mark.parametrize("package", ["contrib"], indirect=True)
def test_drafts_behind_images_are_the_references(package: Package, model: MultimodalLM) -> None:
    given = prompts([(text(3), image(4, 6), text(7))])
    out = package.forward(given.ids.numpy(), **both(given))
    positions = prompt_positions(package.config, given.ids, image_grids=given.images.grids)[:, :, :-1]
    hidden, after = torch.from_numpy(out.hidden)[:, :-1], given.ids[:, 1:]
    expected = model.head(model.draft(hidden, after, position_ids=positions).hidden).numpy()
    found = package.draft(hidden.numpy(), after.numpy(), position_ids=positions.numpy())
    assert error(found.logits, expected) < LIMITS["fp32_logits"]


def test_pieces_of_a_prompt_with_images_give_the_logits_of_the_whole(demo: tuple[Package, MultimodalLM]) -> None:
    package, model = demo
    grids = ((1, 4, 6), (1, 8, 2))
    images = multimodal.Pictures(pixels=pixels_of(grids, 1536), grids=grids)
    row = [5, 6, 2043, *[2046] * 6, 2044, 9, 2043, *[2046] * 4, 2044, 11, 12]
    ids = torch.tensor([row])
    expected = model(ids, images=images).logits.numpy()
    embeddings = package.embed(ids.numpy(), images=pictures(images))
    positions = package.positions(ids.numpy(), images=pictures(images))
    cache, parts = None, []
    for begin, end in ((0, 1), (1, 5), (5, 6), (6, 14), (14, len(row))):
        part = slice(begin, end)
        out = package.forward(
            ids.numpy()[:, part], embeddings=embeddings[:, part], position_ids=positions[:, :, part], cache=cache
        )
        cache = out.cache
        parts.append(out.logits)
    assert error(np.concatenate(parts, axis=1), expected) < LIMITS["fp32_logits"]


@pytest.mark.parametrize("file", [VISION_FILE, EMBEDDING_FILE, MODEL_FILE])
def test_checker_and_strict_shape_inference_pass(package: Package, file: str) -> None:
    path = package.folder / file
    onnx.checker.check_model(str(path), full_check=True)
    proto = onnx.load(str(path), load_external_data=False)
    onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)


@pytest.mark.parametrize("package", ["standard", "functions"], indirect=True)
def test_onnx_itself_evaluates_tower_and_embedding(package: Package, model: MultimodalLM) -> None:
    given = prompts(((text(2), image(2, 4), text(1), image(4, 2), text(1)),))
    grids = np.asarray(given.images.grids)
    tower = ReferenceEvaluator(str(package.folder / VISION_FILE))
    (features,) = tower.run([IMAGE_FEATURES], {PIXEL_VALUES: given.images.pixels.numpy(), IMAGE_GRID: grids})
    assert error(features, model.visual(given.images.pixels, given.images.grids).numpy()) < LIMITS["fp32_vision"]
    embedding = ReferenceEvaluator(str(package.folder / EMBEDDING_FILE))
    (embedded,) = embedding.run([INPUTS_EMBEDS], {INPUT_IDS: given.ids.numpy(), IMAGE_FEATURES: features})
    assert error(embedded, model.embed(given.ids, images=given.images).numpy()) < LIMITS["fp32_vision"]


def wrong_calls() -> Iterator[tuple[str, Grid, dict[str, object], str]]:
    yield "rows that the merger does not divide", (1, 3, 4), {}, "multiples of 2"
    yield "too few image tokens", (1, 6, 4), {}, "4 image tokens.*make 6 embeddings"
    yield "an image of several frames", (2, 4, 2), {}, "2 frames are a video"
    yield "too few pixels", (1, 4, 4), {"pixels": np.zeros((15, 54), np.float32)}, r"\[15, 54\], expected float32"
    yield "pixels of another type", (1, 4, 4), {"pixels": np.zeros((16, 54))}, "float64"
    yield "patches of another size", (1, 4, 4), {"pixels": np.zeros((16, 96), np.float32)}, r"float32 \[16, 54\]"


@pytest.mark.parametrize("package", ["contrib"], indirect=True)
@pytest.mark.parametrize(("grid", "change", "message"), [pytest.param(*row[1:], id=row[0]) for row in wrong_calls()])
def test_pictures_that_do_not_fit_are_refused(
    package: Package, grid: Grid, change: dict[str, object], message: str
) -> None:
    pixels = np.zeros((int(np.prod(grid)), 54), np.float32)
    given = Pictures(**{"pixels": pixels, "grids": (grid,), **change})
    with pytest.raises(UsageError, match=message):
        package.forward(np.array([[412, *[410] * 4, 413]]), images=given)


@pytest.mark.parametrize(("grid", "operator"), [((1, 3, 4), "Reshape"), ((1, 2, 2), "Split"), ((1, 4, 4), "Split")])
def test_the_tower_itself_refuses_grids_that_do_not_fit(package: Package, grid: Grid, operator: str) -> None:
    with pytest.raises(Exception, match=operator):
        seen(package.folder, torch.zeros(12, 54), (grid,))


@pytest.mark.parametrize("package", ["contrib"], indirect=True)
def test_image_tokens_without_pictures_and_embeddings_of_other_tokens_are_refused(package: Package) -> None:
    with pytest.raises(UsageError, match="1 image tokens"):
        package.forward(np.array([[5, 410]]))
    for wrong in (np.zeros((1, 2, 96), np.float32), np.zeros((1, 1, 96))):
        with pytest.raises(UsageError, match=r"expected float32 \[1, 1, 96\]"):
            package.forward(np.array([[410]]), embeddings=wrong)
    with pytest.raises(UsageError, match="both given"):
        images = Pictures(pixels=np.zeros((4, 54), np.float32), grids=((1, 2, 2),))
        package.forward(np.array([[410]]), images=images, embeddings=np.zeros((1, 1, 96), np.float32))


@pytest.mark.parametrize("package", ["contrib"], indirect=True)
def test_the_embedding_graph_refuses_another_number_of_features(package: Package) -> None:
    embedding = load(package.folder / EMBEDDING_FILE, 1)
    with pytest.raises(Exception, match="ScatterND"):
        feeds = {INPUT_IDS: np.array([[410, 5, 410]]), IMAGE_FEATURES: np.zeros((1, 96), np.float32)}
        embedding.run(None, feeds)


def test_the_runtimes_configuration_names_all_graphs(demo: tuple[Package, MultimodalLM]) -> None:
    config = json.loads((demo[0].folder / "genai_config.json").read_text())["model"]
    assert config["type"] == "qwen3_5_moe"
    assert config["decoder"]["inputs"]["inputs_embeds"] == INPUTS_EMBEDS
    assert INPUT_IDS not in config["decoder"]["inputs"]
    tokens = {name: config[name] for name in ("image_token_id", "video_token_id", "vision_start_token_id")}
    assert tokens == {"image_token_id": 2046, "video_token_id": 2047, "vision_start_token_id": 2043}
    processor = json.loads((demo[0].folder / config["vision"]["config_filename"]).read_text())["processor"]
    steps = {one["operation"]["type"]: one["operation"]["attrs"] for one in processor["transforms"]}
    assert steps["Resize"] | {"smart_resize": 1} == {
        "smart_resize": 1, "min_pixels": 4096, "max_pixels": 262144, "patch_size": 16, "merge_size": 2,
    }  # fmt: skip
    assert steps["Normalize"] == {"mean": [0.5] * 3, "std": [0.5] * 3}
