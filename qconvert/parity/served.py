"""Numbers "as served" where a side is a package: what ONNX Runtime computes, beside what passes by of the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from qconvert.io.source_folder import is_package
from qconvert.parity.drafts import DraftScores
from qconvert.parity.heads import Scan
from qconvert.parity.layers import LayerSums, Passed
from qconvert.parity.logits import VocabularyScan
from qconvert.parity.model import SERVED, Comparison, ModelComparison
from qconvert.parity.options import ParityOptions
from qconvert.parity.package_run import PackageRun, run_package
from qconvert.parity.tensors import Progress
from qconvert.parity.windows import Windows
from qconvert.weights.source import CheckpointWeights
from qconvert.weights.spill import SpillStore
from reference_model.config import TextConfig
from reference_model.layer_pass import LayerRecord


def described() -> str:
    """What the two ways of running a package are."""
    import onnxruntime

    return (
        f"As served is what ONNX Runtime {onnxruntime.__version__} computes with the package on a CPU; weights only is "
        "the reference model with the weights that the package holds."
    )


class Engines:
    """Packages among the two sides, and the scores of what they compute, gathered while the other side passes by.

    A side that is no package is seen as served: the original as it is, the converted with its activations rounded.
    """

    def __init__(
        self, config: TextConfig, targets: Tensor, ours: PackageRun | None = None, theirs: PackageRun | None = None
    ) -> None:
        """``targets`` int64 [T]: what follows each position in the text."""
        self.ours, self.theirs = ours, theirs
        self._scan = VocabularyScan(targets)
        layered = theirs is not None and theirs.layered and (ours is None or ours.layered)
        self._sums = [LayerSums() for _ in range(config.num_hidden_layers if layered else 0)]

    @property
    def tapped(self) -> bool:
        """Whether the converted side is a package that gives the states of its layers."""
        return self.theirs is not None and self.theirs.tapped

    @property
    def notes(self) -> Iterator[str]:
        """What a reader must know of packages."""
        if self.ours is None and self.theirs is None:
            return
        yield described()
        if self.tapped and not self._sums:
            yield "As served there are no numbers of layers: the other package gives none. Export it with --taps."
        elif self.theirs is not None and not self.tapped:
            yield (
                "The package gives no states of its layers: as served there are no numbers of layers, and a fault of "
                "execution is not localised. Export it with --taps for both."
            )
        if any(run is not None and run.sees for run in (self.ours, self.theirs)):
            yield "Images were not run: the weights of the vision tower alone were compared."

    def watch_original(self, others: Scan | None = None) -> Scan | None:
        """What shall see the original's logits: the scores, and ``others``."""
        if self.theirs is None or self.ours is not None:
            return None if self.ours is not None else others
        theirs = self.theirs

        def see(first_row: int, first_token: int, logits: Tensor) -> None:
            self._scan.add(first_row, first_token, logits, theirs.logits(first_row, first_token, len(logits)))
            if others is not None:
                others(first_row, first_token, logits)

        return see

    def watch_converted(self) -> Scan | None:
        """What shall see the converted side's logits as served."""
        if self.ours is None or self.theirs is not None:
            return None
        ours = self.ours

        def see(first_row: int, first_token: int, logits: Tensor) -> None:
            self._scan.add(first_row, first_token, ours.logits(first_row, first_token, len(logits)), logits)

        return see

    def watch_layers(self) -> Engines | None:
        """Who shall see the original's layers."""
        return self if self._sums and self.ours is None else None

    def see(self, record: LayerRecord) -> None:
        """Compare what a layer of the original did to a batch with the same of the package."""
        routing = record.routing
        ours = Passed(hidden=record.hidden, experts=routing.experts, weights=routing.weights)
        self._compare(record.layer, record.batch, ours)

    def kept(self) -> Iterator[tuple[str, Tensor]]:
        """The sums so far: a package is run anew by a run that goes on, layers that have passed are not."""
        yield "engine.sums", torch.stack([one.sums for one in self._sums])

    def restore(self, kept: Callable[[str], Tensor]) -> None:
        """Take up what ``kept`` of an earlier run has given."""
        self._sums = [LayerSums(sums) for sums in kept("engine.sums")]

    def scan_own(self, others: Scan | None = None) -> None:
        """Let the logits of a package that stands for the original pass by: for ``others``, and for another package."""
        if self.ours is None:
            return
        for row, first, count in self.ours.slabs():
            logits = self.ours.logits(row, first, count)
            if self.theirs is not None:
                self._scan.add(row, first, logits, self.theirs.logits(row, first, count))
            if others is not None:
                others(row, first, logits)
        if self.theirs is not None and self._sums:
            for layer in range(len(self._sums)):
                for batch in dict.fromkeys(call.batch for call in self.ours.calls):
                    self._compare(layer, batch, self.ours.passed(layer, batch))

    def into(self, found: Comparison) -> Comparison:
        """``found`` with what engines compute as the numbers as served."""
        if self.ours is None and self.theirs is None:
            return found
        rest = found.served
        layers, forced, plain = rest.layers, rest.forced, found.plain
        if self.theirs is not None:
            # what was fed by hand was fed to its weights
            layers, forced = tuple(one.scores() for one in self._sums), ()
            plain = replace(plain, forced=rest.forced)
        served = ModelComparison(
            mode=SERVED, scores=self._scan.scores(), layers=layers, forced=forced, drafts=self._drafts(rest)
        )
        return replace(found, plain=plain, served=served)

    def _drafts(self, rest: ModelComparison) -> DraftScores | None:
        if rest.drafts is None:
            return None
        before, after = rest.drafts.original, rest.drafts.converted
        if self.ours is not None and self.ours.accepted is not None:
            before = self.ours.accepted
        if self.theirs is not None and self.theirs.accepted is not None:
            after = self.theirs.accepted
        return DraftScores(original=before, converted=after)

    def _compare(self, layer: int, batch: int, ours: Passed) -> None:
        if self.theirs is not None:
            self._sums[layer].add(ours, self.theirs.passed(layer, batch))


def run_packages(
    sides: tuple[CheckpointWeights, CheckpointWeights],
    windows: Windows,
    store: SpillStore,
    options: ParityOptions,
    progress: Progress,
) -> Engines:
    """Run whichever of the two ``sides`` are packages; see ``run_package``."""
    runs: list[PackageRun | None] = []
    for side, name in zip(sides, ("original package", "package"), strict=True):
        told = partial(progress, name)
        runs.append(
            run_package(
                side.checkpoint.path, side.config.text, windows.batches, store, name=name, drafts=options.drafts,
                layers=True, progress=told,
            )
            if is_package(side.checkpoint.path)
            else None
        )  # fmt: skip
    return Engines(sides[0].config.text, windows.targets, *runs)
