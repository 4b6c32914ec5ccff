"""A package with taps gives what the reference computes in each layer, and a fault shows where it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from qconvert.onnx_export.runtime import Package
from qconvert.onnx_export.states import TAPS, tap_name
from reference_model.model import CausalLM
from tests.checkpoints import make_tiny
from tests.edits import edit_tensors
from tests.onnx_export.packages import EXACT, error, exported, prompt, reference
from tests.tolerances import tolerances

LIMIT = tolerances("onnx_export")["fp32_logits"]
LAYERS = 4


@contextmanager
def listening(model: CausalLM) -> Iterator[dict[str, Tensor]]:
    """What the modules of each layer give while the model runs, under the names of taps."""
    heard: dict[str, Tensor] = {}
    handles = []
    for number, layer in enumerate(model.layers):
        parts = {"mixer": getattr(layer, "self_attn", None) or layer.linear_attn, "moe": layer.mlp, "hidden": layer}
        for tap, module in parts.items():

            def hear(_module: object, _given: object, made: object, name: str = tap_name(number, tap)) -> None:
                heard[name] = made[0] if isinstance(made, tuple) else made

            handles.append(module.register_forward_hook(hear))
    yield heard
    for handle in handles:
        handle.remove()


@pytest.fixture(scope="module")
def tapped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Package]:
    folder = tmp_path_factory.mktemp("taps")
    make_tiny(folder / "source", layers=LAYERS, mtp=False, vision=False)
    return folder / "source", exported(folder / "source", folder / "package", replace(EXACT, taps=True))


@torch.no_grad()
def test_every_tap_is_what_the_reference_computes(tapped: tuple[Path, Package]) -> None:
    source, package = tapped
    model = reference(source)
    ids, logits = prompt(model, 2, 40)
    with listening(model) as heard:
        routers = model(torch.from_numpy(ids)).router_logits
    out = package.forward(ids)
    assert error(out.logits, logits) < LIMIT
    assert set(out.taps) == {tap_name(layer, tap) for layer in range(LAYERS) for tap in TAPS}
    for name, values in heard.items():
        assert error(out.taps[name], values.reshape(out.taps[name].shape).numpy()) < LIMIT, name
    for layer, values in enumerate(routers):
        assert error(out.taps[tap_name(layer, "router")].reshape(values.shape), values.numpy()) < LIMIT


def test_a_fault_shows_in_its_layer_and_not_before(tapped: tuple[Path, Package], tmp_path: Path) -> None:
    source, package = tapped
    make_tiny(tmp_path / "source", layers=LAYERS, mtp=False, vision=False)

    def silence(found: dict[str, Tensor]) -> None:
        for name, tensor in found.items():
            if "layers.2.mlp.shared_expert.down_proj" in name:
                tensor.zero_()

    edit_tensors(tmp_path / "source", silence)
    faulty = exported(tmp_path / "source", tmp_path / "package", replace(EXACT, taps=True))
    ids, _ = prompt(reference(source), 1, 20)
    right, wrong = package.forward(ids).taps, faulty.forward(ids).taps
    differ = {name for name in right if not np.array_equal(right[name], wrong[name])}
    assert min(differ) == tap_name(2, "hidden")
    assert tap_name(2, "moe") in differ and tap_name(2, "mixer") not in differ and tap_name(2, "router") not in differ


def test_a_package_without_taps_has_none(tapped: tuple[Path, Package], tmp_path: Path) -> None:
    source, _ = tapped
    plain = exported(source, tmp_path / "package")
    assert plain.forward(np.array([[3, 4]])).taps == {}
