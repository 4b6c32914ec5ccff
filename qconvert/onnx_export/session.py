"""One graph of a package in ONNX Runtime, with what it keeps between calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qconvert.core.errors import SourceError, UsageError
from qconvert.onnx_export.graph_file import read_graph
from qconvert.onnx_export.operators import newer_than, unfinished_opset, version_named
from qconvert.onnx_export.places import check_places
from qconvert.onnx_export.states import INPUT_IDS, INPUTS_EMBEDS, PAST, present_of

try:
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as errors
except ImportError as missing:
    raise UsageError(
        f"running a package takes ONNX Runtime, which is not installed ({missing}): pip install 'qconvert[onnxruntime]'"
    ) from missing

Array = NDArray[np.generic]
Floats = NDArray[np.float32]
Integers = NDArray[np.int64]

_REFUSALS = (
    errors.Fail,
    errors.InvalidArgument,
    errors.InvalidGraph,
    errors.InvalidProtobuf,
    errors.NotImplemented,
    errors.RuntimeException,
)
"""What ONNX Runtime raises for a graph; they have no class of their own in common."""


_NUMPY: Mapping[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
}
"""Types of inputs that numpy knows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageCache:
    """What the tokens so far have left behind. Never written to: a call makes a new one.

    Attributes:
        states: by the name of the output that gave it.
        mask: int64 [B, P], which of the tokens so far were real.
        next_position: int64 [B], one more than the largest position of each row.
    """

    states: Mapping[str, Array]
    mask: Integers
    next_position: Integers


def load(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """A graph on the CPU; ``threads`` 0 leaves their number to ONNX Runtime.

    Raises:
        SourceError: the installed ONNX Runtime lacks an operator, or refuses the graph; or weights are not where the
            graph reads them.
    """
    version = onnxruntime.__version__
    graph, installed = read_graph(path), version_named(version)
    check_places(path, graph)
    lacking = newer_than(graph, installed)
    if lacking:
        raise SourceError(f"{path}: ONNX Runtime {version} lacks {', '.join(sorted(lacking))}: install a newer one")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except _REFUSALS as error:
        told = "".join(f"{note}. " for note in unfinished_opset(graph.opset_imports.get("", 0), installed))
        raise SourceError(f"{path}: ONNX Runtime {version} refuses it: {told}{error}") from error


def check_ids(ids: Integers, vocabulary: int) -> None:
    """Raise ``UsageError`` unless ids are int64 [B, S], not none, and of the vocabulary."""
    if ids.ndim != 2 or not ids.size or ids.dtype != np.int64:
        raise UsageError(f"input_ids is {ids.dtype} {list(ids.shape)}, expected int64 [B, S] of one token or more")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary:
        raise UsageError(f"input_ids has {low if low < 0 else high}, but the vocabulary is 0 .. {vocabulary - 1}")


class Session:
    """A graph that takes tokens or their embeddings, their mask and positions, and states that it gives back.

    Attributes:
        outputs: names of what it gives besides states.
        embedded: whether it takes embeddings instead of ids.
    """

    outputs: tuple[str, ...]
    embedded: bool

    def __init__(self, path: Path, *, vocabulary: int, threads: int) -> None:
        """Load the graph and its weights; ``threads`` 0 leaves their number to ONNX Runtime.

        ``vocabulary`` is the number of tokens that there are.

        Raises:
            SourceError: the installed ONNX Runtime lacks an operator, or refuses the graph.
        """
        self._vocabulary = vocabulary
        self._session = load(path, threads)
        inputs = {given.name: given.shape for given in self._session.get_inputs()}
        # the batch is the first name of a varying dimension, tokens before the second
        self._empty = {name: [0 if isinstance(n, str) else n for n in dims[1:]] for name, dims in inputs.items()}
        self.embedded = INPUTS_EMBEDS in inputs
        self._width = inputs[INPUTS_EMBEDS][-1] if self.embedded else 0
        self._types = {given.name: _NUMPY[given.type] for given in self._session.get_inputs()}
        self._past = tuple(name for name in inputs if name.startswith(PAST))
        present = {present_of(name) for name in self._past}
        self.outputs = tuple(out.name for out in self._session.get_outputs() if out.name not in present)

    def run(
        self,
        input_ids: Integers,
        *,
        attention_mask: Integers | None,
        position_ids: Integers | None,
        cache: PackageCache | None,
        beside: Mapping[str, Array],
    ) -> tuple[dict[str, Floats], PackageCache]:
        """Run tokens [B, S] after those of ``cache``, with further inputs ``beside``; see ``Package.forward``.

        Where the graph takes embeddings, these are among the further inputs.
        """
        self._check(input_ids, attention_mask, position_ids, cache)
        batch, new = input_ids.shape
        if self.embedded:
            given, expected = beside[INPUTS_EMBEDS], (batch, new, self._width)
            if given.shape != expected or given.dtype != np.float32:
                raise UsageError(
                    f"embeddings are {given.dtype} {list(given.shape)}, expected float32 {list(expected)}: those of "
                    "these tokens"
                )
        real = np.ones((batch, new), np.int64) if attention_mask is None else (attention_mask != 0).astype(np.int64)
        before = np.zeros(batch, np.int64) if cache is None else cache.next_position
        if position_ids is None:
            counted = before[:, None] + np.maximum(real.cumsum(1) - 1, 0)
            position_ids = np.broadcast_to(counted, (3, batch, new)).astype(np.int64)
        mask = real if cache is None else np.concatenate((cache.mask, real), axis=1)
        feeds = {"attention_mask": mask, "position_ids": position_ids, **beside}
        if not self.embedded:
            feeds[INPUT_IDS] = input_ids
        for name in self._past:
            empty = (batch, *self._empty[name])
            feeds[name] = np.zeros(empty, self._types[name]) if cache is None else cache.states[present_of(name)]
        states = [present_of(name) for name in self._past]
        found = self._session.run([*self.outputs, *states], feeds)
        largest = np.where(real.astype(bool), position_ids, -1).max(axis=(0, 2))
        after = PackageCache(
            states=dict(zip(states, found[len(self.outputs) :], strict=True)),
            mask=mask,
            next_position=np.maximum(before, largest + 1),
        )
        return dict(zip(self.outputs, found, strict=False)), after

    def _check(
        self,
        ids: Integers,
        mask: Integers | None,
        positions: Integers | None,
        cache: PackageCache | None,
    ) -> None:
        """Raise ``UsageError`` for what ONNX Runtime would refuse in its own words, or answer with other rows."""
        check_ids(ids, self._vocabulary)
        if mask is not None and mask.shape != ids.shape:
            raise UsageError(f"attention_mask is {list(mask.shape)}, expected {list(ids.shape)}: that of these tokens")
        if positions is not None and positions.shape != (3, *ids.shape):
            raise UsageError(f"position_ids is {list(positions.shape)}, expected {[3, *ids.shape]}")
        if cache is not None and (cache.mask.shape[0] != len(ids) or {*map(present_of, self._past)} != {*cache.states}):
            raise UsageError(f"the cache is of another batch or graph; these are {len(ids)} rows")
