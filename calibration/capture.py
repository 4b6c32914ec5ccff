"""Run a checkpoint over token windows, layer by layer, and write what its matrices' inputs were like.

The run is that of the reference model: one layer's weights in memory, one routed expert a thread, hidden states that
wait on disk where memory does not hold them. After each layer its statistics are a file, and the states at its end are
kept: a run that was killed loses the layer that it was in.

Shapes: B windows, T tokens, D hidden, F width of an expert.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from calibration.coverage import cover
from calibration.coverage_picture import picture
from calibration.data import CalibrationWindows
from calibration.observer import LayerObserver
from calibration.sites import HEAD, MTP_FC
from calibration.statistics import DOCUMENT, SCHEMA, Statistics
from qconvert import __version__
from qconvert.core.coverage import Coverage, layer_name
from qconvert.core.errors import DataError, UsageError, explain_going_on
from qconvert.core.role import Section
from qconvert.io.disk import disk_errors, sync_file, sync_folder
from qconvert.io.file_record import hash_span
from qconvert.io.fingerprint import fingerprint
from qconvert.io.hashing import XXH3, new_hash
from qconvert.io.partial_folder import PartialFolder
from qconvert.numerics.threads import side_by_side
from qconvert.weights.boundaries import Boundaries, identity_hash
from qconvert.weights.source import CheckpointWeights
from qconvert.weights.spill import SpillStore
from reference_model.each import Each
from reference_model.layer_drafts import has_prediction_head, run_drafts
from reference_model.layer_pass import Batch, Lane, LayerRecord, pass_layer
from reference_model.layerwise import HiddenStates, embed, finish

Progress = Callable[[str, int, int], None]

PICTURE = "coverage.svg"
_STATES = ".states"
_OUTSIDE_FILE = "head.safetensors"


def capture(
    model: Path,
    out: Path,
    windows: CalibrationWindows,
    *,
    jobs: int = 1,
    memory: int,
    fresh: bool = False,
    progress: Progress = lambda phase, done, total: None,
) -> Coverage:
    """Write the statistics of ``model`` over ``windows`` into the new folder ``out``; it appears whole or not at all.

    The bytes depend neither on ``jobs`` and ``memory`` nor on interruptions.

    Args:
        model: folder of the checkpoint, quantized or not.
        out: folder that does not exist yet.
        windows: what it is run on.
        jobs: batches and experts that are computed at once, on one thread each.
        memory: bytes that this may take: half of it for states that wait, which are otherwise on disk, a quarter for
            the tokens that enter experts together, and the rest for the weights of a layer and for what it computes.
        fresh: start over instead of going on from what an earlier run left.
        progress: called with a phase, batches that have passed a layer, and all.

    Returns:
        How many tokens each expert got.

    Raises:
        SourceError: ``model`` is no checkpoint that can be read.
        DataError: inputs are NaN or infinite.
        OutputError: ``out`` exists, another run writes it, or the disk refuses.
        UsageError: an earlier run of other options has left its work.
    """
    with CheckpointWeights.open(model) as source:
        identity = _identity(source, windows)
        folder = PartialFolder(out)
        try:
            if fresh or not folder.left_behind:
                folder.start()
            _run(source, folder.path, windows, identity, jobs, memory, progress)
            coverage = _read_back(folder.path, windows.tokens)
            folder.publish()
            return coverage
        except UsageError:  # what is there is another run's
            folder.leave()
            raise
        except DataError:  # the same would happen again
            folder.discard()
            raise
        except BaseException as error:
            if not any((folder.path / _STATES).glob("layer-*")):
                folder.discard()
                raise
            folder.leave()
            explain_going_on(error, out)
            raise


def _identity(source: CheckpointWeights, windows: CalibrationWindows) -> dict[str, Any]:
    """What statistics are of: the same of two runs that give the same."""
    return {
        "schema": SCHEMA,
        "qconvert": __version__,
        "torch": torch.__version__,
        "source": fingerprint(source.checkpoint),
        "windows": dict(windows.record),
    }


def _run(
    source: CheckpointWeights,
    folder: Path,
    windows: CalibrationWindows,
    identity: dict[str, Any],
    jobs: int,
    memory: int,
    progress: Progress,
) -> None:
    boundaries = Boundaries(
        folder=folder / _STATES,
        identity=identity_hash(identity),
        advice="--fresh starts over",
    )
    with SpillStore(memory // 2, folder) as store, side_by_side(jobs) as each:
        run = _Capture(source, folder, windows, store, memory // 4, each, progress)
        run.decoder(boundaries)
        run.head()
    boundaries.remove()
    _describe(folder, identity, run.files)


def _read_back(folder: Path, tokens: int) -> Coverage:
    """Read all that was written, and draw what it says of the experts beside it."""
    with Statistics.open(folder) as found:
        coverage = cover(tuple(found.layers()), tokens)
    with disk_errors(folder / PICTURE):
        (folder / PICTURE).write_text(picture(coverage), encoding="utf-8")
    return coverage


class _Capture:
    """A checkpoint on its way through the layers.

    Attributes:
        files: names of the files that are written, in the order of the layers.
    """

    def __init__(
        self,
        source: CheckpointWeights,
        folder: Path,
        windows: CalibrationWindows,
        store: SpillStore,
        rows_bytes: int,
        each: Each,
        progress: Progress,
    ) -> None:
        self._source, self._folder, self._batches = source, folder, windows.batches
        self._rows_bytes, self._each = rows_bytes, each
        self._config = source.config.text
        self._hidden = HiddenStates(store=store, count=len(windows.batches))
        self._drafts = HiddenStates(store=store, count=len(windows.batches), name="draft")
        self._depth = self._config.num_hidden_layers
        heads = self._config.mtp_num_hidden_layers if has_prediction_head(self._config, source) else 0
        self._total = (self._depth + heads) * len(self._batches)
        self._has_head = heads > 0
        self._ticks = count(1)
        self._progress = progress
        self.files: list[str] = []

    def decoder(self, boundaries: Boundaries) -> None:
        """Pass all layers of the decoder, from where an earlier run has stopped."""
        inputs = [Batch(ids=ids) for ids in self._batches]
        embed(self._config, self._source, inputs, self._hidden, torch.float32)
        found = boundaries.load()
        first = 0
        if found is not None:
            first, kept = found
            for b in range(len(inputs)):
                self._hidden.put(b, kept(f"hidden.{b}"))
        self.files += [_layer_file(Section.TEXT, n) for n in range(first)]
        self._ticks = count(1 + first * len(inputs))
        for n in range(first, self._depth):
            observer = LayerObserver(layer_name(Section.TEXT, n), len(inputs))

            def give(record: LayerRecord, observer: LayerObserver = observer) -> None:
                self._hidden.put(record.batch, record.hidden)
                self._see(observer, record)

            lanes = [
                Lane(take=self._hidden.__getitem__, give=give, rounding=observer.rounding(b), batches=(b,))
                for b in range(len(inputs))
            ]
            pass_layer(
                self._config, self._source, n, inputs, lanes, torch.float32,
                rows_bytes=self._rows_bytes, each=self._each,
            )  # fmt: skip
            self._write(_layer_file(Section.TEXT, n), self._of_layer(observer))
            boundaries.save(n + 1, ((f"hidden.{b}", self._hidden[b]) for b in range(len(inputs))))

    def head(self) -> None:
        """The output matrix, and the prediction head where there is one."""
        finish(self._config, self._source, self._hidden, torch.float32)
        outside = LayerObserver("", len(self._batches))
        layers = [
            LayerObserver(layer_name(Section.MTP, n), len(self._batches))
            for n in range(self._config.mtp_num_hidden_layers if self._has_head else 0)
        ]
        for b in range(len(self._batches)):
            _look(outside, b, HEAD, self._hidden[b])

        def rounding(b: int) -> Callable[[str], Callable[[Tensor], Tensor] | None]:
            owners = {layer_name(Section.MTP, n): one.rounding(b) for n, one in enumerate(layers)}
            owners[MTP_FC] = outside.rounding(b)

            def of(module: str) -> Callable[[Tensor], Tensor] | None:
                owner = owners.get(module if module == MTP_FC else ".".join(module.split(".")[:3]))
                return None if owner is None else owner(module)

            return of

        if self._has_head:
            run_drafts(
                self._config, self._source, self._batches, self._hidden, self._drafts, torch.float32,
                on_layer=lambda record: self._see(layers[record.layer], record),
                input_roundings=[rounding(b) for b in range(len(self._batches))],
                rows_bytes=self._rows_bytes, each=self._each,
            )  # fmt: skip
        for n, observer in enumerate(layers):
            self._write(_layer_file(Section.MTP, n), self._of_layer(observer))
        self._write(_OUTSIDE_FILE, outside.tensors(0, 0, 0))

    def _see(self, observer: LayerObserver, record: LayerRecord) -> None:
        observer.count(record)
        self._progress("layers", next(self._ticks), self._total)

    def _of_layer(self, observer: LayerObserver) -> dict[str, Tensor]:
        config = self._config
        return observer.tensors(config.stored_experts, config.hidden_size, config.moe_intermediate_size)

    def _write(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Write a file whole and durably: what is kept of states must not be ahead of it."""
        partial = self._folder / f"{name}.partial"
        with disk_errors(self._folder / name):
            partial.write_bytes(save(tensors))
            sync_file(partial)
            partial.rename(self._folder / name)
            sync_folder(self._folder)
        self.files.append(name)


def _look(observer: LayerObserver, batch: int, module: str, x: Tensor) -> None:
    look = observer.rounding(batch)(module)
    if look is not None:
        look(x)


def _layer_file(section: Section, layer: int) -> str:
    return f"{'layer' if section is Section.TEXT else section.value}-{layer:05}.safetensors"


def _describe(folder: Path, identity: dict[str, Any], files: list[str]) -> None:
    """The document that vouches for all files."""
    entries = {}
    for name in files:
        fd = os.open(folder / name, os.O_RDONLY)
        try:
            nbytes = os.fstat(fd).st_size
            digest = new_hash(XXH3)
            hash_span(fd, 0, nbytes, digest, folder / name)
        finally:
            os.close(fd)
        entries[name] = {"bytes": nbytes, "hash": digest.hexdigest()}
    text = json.dumps({**identity, "files": entries}, indent=1, ensure_ascii=False) + "\n"
    with disk_errors(folder / DOCUMENT):
        (folder / DOCUMENT).write_text(text, encoding="utf-8")
