"""Run a package with ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as errors

from qconvert.core.errors import SourceError
from qconvert.io.source_folder import MODEL_FILE
from qconvert.onnx_export.operators import newer_than, version_named
from qconvert.onnx_export.states import State, layer_states
from reference_model.config import ModelConfig
from reference_model.config_fields import ConfigError

Array = NDArray[np.generic]

_REFUSALS = (
    errors.Fail,
    errors.InvalidArgument,
    errors.InvalidGraph,
    errors.InvalidProtobuf,
    errors.NotImplemented,
    errors.RuntimeException,
)
"""What ONNX Runtime raises for a graph; they have no class of their own in common."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageCache:
    """What the tokens so far have left behind. Never written to: a call makes a new one.

    Attributes:
        states: by the name of the output that gave it.
        mask: int64 [B, P], which of the tokens so far were real.
        next_position: int64 [B], one more than the largest position of each row.
    """

    states: Mapping[str, Array]
    mask: Array
    next_position: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageOutput:
    """What a call gives: logits float32 [B, S, V], without meaning at padding, and the cache to go on from."""

    logits: NDArray[np.float32]
    cache: PackageCache


class Package:
    """The decoder of a package on the CPU.

    Attributes:
        config: of the checkpoint that was exported.
    """

    config: ModelConfig

    def __init__(self, folder: Path, *, threads: int = 0) -> None:
        """Load the graph and its weights; ``threads`` 0 leaves their number to ONNX Runtime.

        Raises:
            SourceError: no package, or ONNX Runtime refuses it.
        """
        try:
            self.config = ModelConfig.from_file(folder / "config.json")
        except ConfigError as error:
            raise SourceError(str(error)) from error
        if not (folder / MODEL_FILE).is_file():
            raise SourceError(f"{folder}: no {MODEL_FILE}, so no package; `qconvert export-onnx` makes one")
        lacking = newer_than(ir.load(folder / MODEL_FILE).graph, version_named(onnxruntime.__version__))
        if lacking:
            raise SourceError(
                f"{folder / MODEL_FILE}: ONNX Runtime {onnxruntime.__version__} lacks {', '.join(sorted(lacking))}: "
                "install a newer one"
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        try:
            self._session = onnxruntime.InferenceSession(
                str(folder / MODEL_FILE), options, providers=["CPUExecutionProvider"]
            )
        except _REFUSALS as error:
            raise SourceError(
                f"{folder / MODEL_FILE}: ONNX Runtime {onnxruntime.__version__} refuses it: {error}"
            ) from error
        self._states: tuple[State, ...] = tuple(
            state
            for layer in range(self.config.text.num_hidden_layers)
            for state in layer_states(self.config.text, layer)
        )

    def forward(
        self,
        input_ids: NDArray[np.int64],
        *,
        attention_mask: NDArray[np.int64] | None = None,
        position_ids: NDArray[np.int64] | None = None,
        cache: PackageCache | None = None,
    ) -> PackageOutput:
        """Run tokens after those of ``cache``; every row as if it were alone.

        Args:
            input_ids: [B, S].
            attention_mask: [B, S], zero where these tokens are padding.
            position_ids: [3, B, S]; by default real tokens count on from the cache.
            cache: of the tokens before.
        """
        batch, new = input_ids.shape
        real = np.ones((batch, new), np.int64) if attention_mask is None else attention_mask.astype(np.int64)
        before = np.zeros(batch, np.int64) if cache is None else cache.next_position
        if position_ids is None:
            counted = before[:, None] + np.maximum(real.cumsum(1) - 1, 0)
            position_ids = np.broadcast_to(counted, (3, batch, new)).astype(np.int64)
        mask = real if cache is None else np.concatenate((cache.mask, real), axis=1)
        feeds: dict[str, Array] = {"input_ids": input_ids, "attention_mask": mask, "position_ids": position_ids}
        for state in self._states:
            feeds[state.past] = (
                np.zeros(state.sizes(0, batch), np.float32) if cache is None else cache.states[state.present]
            )
        names = ["logits", *(state.present for state in self._states)]
        logits, *states = self._session.run(names, feeds)
        largest = np.where(real.astype(bool), position_ids, -1).max(axis=(0, 2))
        return PackageOutput(
            logits=logits,
            cache=PackageCache(
                states=dict(zip(names[1:], states, strict=True)),
                mask=mask,
                next_position=np.maximum(before, largest + 1),
            ),
        )
