"""Run a package with ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from qconvert.core.errors import SourceError, UsageError
from qconvert.io.source_folder import CONFIG_FILE, MODEL_FILE, MTP_FILE, VISION_FILE
from qconvert.onnx_export.embedder import Embedder, Pictures
from qconvert.onnx_export.end_tokens import end_tokens, generation_config
from qconvert.onnx_export.genai_config import provider_of
from qconvert.onnx_export.precision import CPU
from qconvert.onnx_export.session import Floats, Integers, PackageCache, Session
from qconvert.onnx_export.states import HIDDEN_OUT, HIDDEN_STATES, INPUTS_EMBEDS, LOGITS
from reference_model.config import ModelConfig
from reference_model.config_fields import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageOutput:
    """What a call gives. At padding there are numbers without meaning.

    Attributes:
        logits: float32 [B, S, V], or [B, 1, V] of each row's last real token in a package that has those alone.
        hidden: float32 [B, S, D], what a prediction head drafts from; ``None`` in a package without one.
        cache: to go on from.
        taps: of a package with taps what happened in each layer, by the names of its outputs, see ``states.TAPS``.
    """

    logits: Floats
    hidden: Floats | None
    cache: PackageCache
    taps: Mapping[str, Floats] = field(default_factory=dict)


def check_provider(folder: Path) -> None:
    """Raise ``SourceError`` where the package in ``folder`` was not exported for the CPU."""
    if (provider := provider_of(folder)) != CPU:
        raise SourceError(
            f"{folder} was exported for the provider {provider}: onnxruntime-genai runs it on such a machine; a "
            "package that runs here is exported with --ep cpu. `qconvert parity --weights-only` compares its weights"
        )


class Package:
    """The decoder of a package on the CPU, and what else it has: a prediction head, a vision tower.

    Attributes:
        folder: where it is.
        config: of the checkpoint that was exported.
        end_tokens: ids that end a text.
    """

    folder: Path
    config: ModelConfig
    end_tokens: tuple[int, ...]

    def __init__(self, folder: Path, *, threads: int = 0) -> None:
        """Load the decoder and its weights; ``threads`` 0 leaves their number to ONNX Runtime.

        Raises:
            SourceError: no package, one for a GPU, or ONNX Runtime refuses it.
        """
        try:
            self.config = ModelConfig.from_file(folder / CONFIG_FILE)
        except ConfigError as error:
            raise SourceError(str(error)) from error
        if not (folder / MODEL_FILE).is_file():
            raise SourceError(f"{folder}: no {MODEL_FILE}, so no package; `qconvert export-onnx` makes one")
        check_provider(folder)
        self.folder, self._threads = folder, threads
        self.end_tokens = end_tokens(self.config.text, generation_config(folder))
        self._decoder = self._session(MODEL_FILE)
        self._embedder = Embedder(folder, self.config, threads=threads) if self._decoder.embedded else None

    @property
    def drafts(self) -> bool:
        """Whether it has a prediction head."""
        return (self.folder / MTP_FILE).is_file()

    @property
    def sees(self) -> bool:
        """Whether prompts may show images."""
        return self._embedder is not None

    @cached_property
    def _head(self) -> Session:
        """Loaded when it is first asked: it has embedding and head in memory once more, and most never draft."""
        return self._session(MTP_FILE)

    def _session(self, name: str) -> Session:
        return Session(self.folder / name, vocabulary=self.config.text.vocab_size, threads=self._threads)

    def forward(
        self,
        input_ids: Integers,
        *,
        attention_mask: Integers | None = None,
        position_ids: Integers | None = None,
        cache: PackageCache | None = None,
        images: Pictures | None = None,
        videos: Pictures | None = None,
        embeddings: Floats | None = None,
    ) -> PackageOutput:
        """Run tokens after those of ``cache``; every row as if it were alone.

        Behind a cache and without pictures all tokens are text: a model may draw the id of an image token itself.

        Args:
            input_ids: [B, S].
            attention_mask: [B, S], zero where these tokens are padding.
            position_ids: [3, B, S]; by default real tokens count on from the cache, and those of pictures have their
                row and column.
            cache: of the tokens before.
            images: all whose tokens are among these.
            videos: the same.
            embeddings: of these tokens [B, S, D], see ``embed``; they stand for pictures too.

        Raises:
            UsageError: ids that are not of the vocabulary, shapes that do not fit each other, pictures that do not fit
                their tokens, or pictures for a package without a vision tower.
        """
        beside: dict[str, Floats] = {}
        pictured = images is not None or videos is not None
        if pictured and embeddings is not None:
            raise UsageError("pictures and embeddings were both given; embed() puts pictures into embeddings")
        if pictured and position_ids is None:
            position_ids = self.positions(
                input_ids, images=images, videos=videos, attention_mask=attention_mask, cache=cache
            )
        if self.sees or pictured or embeddings is not None:
            if embeddings is None and (pictured or cache is None):
                embeddings = self.embed(input_ids, images=images, videos=videos)
            beside[INPUTS_EMBEDS] = self._eyes().look_up(input_ids) if embeddings is None else embeddings
        found, after = self._decoder.run(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, cache=cache, beside=beside
        )
        logits, hidden = found.pop(LOGITS), found.pop(HIDDEN_STATES, None)
        return PackageOutput(logits=logits, hidden=hidden, cache=after, taps=found)

    def embed(self, input_ids: Integers, *, images: Pictures | None = None, videos: Pictures | None = None) -> Floats:
        """Embeddings [B, S, D] of prompts with all their pictures, which may then be run in pieces.

        Raises:
            UsageError: pictures do not fit their tokens, or the package has no vision tower.
        """
        return self._eyes().embed(input_ids, images=images, videos=videos)

    def look_up(self, input_ids: Integers) -> Floats:
        """Embeddings [B, S, D] of tokens that are all text, those that stand for pictures elsewhere too.

        Raises:
            UsageError: the package has no vision tower, and takes ids.
        """
        return self._eyes().look_up(input_ids)

    def positions(
        self,
        input_ids: Integers,
        *,
        images: Pictures | None = None,
        videos: Pictures | None = None,
        attention_mask: Integers | None = None,
        cache: PackageCache | None = None,
    ) -> Integers:
        """Positions int64 [3, B, S] of prompts with all their pictures, behind ``cache``.

        Raises:
            UsageError: pictures do not fit their tokens, or the package has no vision tower.
        """
        start = None if cache is None else cache.next_position
        return self._eyes().positions(
            input_ids, images=images, videos=videos, attention_mask=attention_mask, start=start
        )

    def _eyes(self) -> Embedder:
        if self._embedder is None:
            raise UsageError(f"the package has no {VISION_FILE}: its prompts are text alone")
        return self._embedder

    def draft(
        self,
        hidden: Floats,
        next_ids: Integers,
        *,
        attention_mask: Integers | None = None,
        position_ids: Integers | None = None,
        cache: PackageCache | None = None,
    ) -> PackageOutput:
        """Run the prediction head: its logits score the token after ``next_ids``, see ``CausalLM.draft``.

        ``hidden`` [B, S, D] is of positions t, ``next_ids`` [B, S] are the tokens at t + 1; mask and positions are
        those of t, and ``cache`` is the head's own.

        Raises:
            UsageError: the package has no prediction head; else see ``forward``.
            SourceError: ONNX Runtime refuses its graph.
        """
        if not self.drafts:
            raise UsageError(f"the package has no {MTP_FILE} to draft with")
        found, after = self._head.run(
            next_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            beside={HIDDEN_STATES: hidden},
        )
        return PackageOutput(logits=found[LOGITS], hidden=found[HIDDEN_OUT], cache=after)
