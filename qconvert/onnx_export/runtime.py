"""Run a package with ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from qconvert.core.errors import SourceError, UsageError
from qconvert.io.source_folder import CONFIG_FILE, MODEL_FILE, MTP_FILE
from qconvert.onnx_export.end_tokens import end_tokens, generation_config
from qconvert.onnx_export.session import Floats, Integers, PackageCache, Session
from qconvert.onnx_export.states import HIDDEN_OUT, HIDDEN_STATES, LOGITS
from reference_model.config import ModelConfig
from reference_model.config_fields import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageOutput:
    """What a call gives. At padding there are numbers without meaning.

    Attributes:
        logits: float32 [B, S, V].
        hidden: float32 [B, S, D], what a prediction head drafts from; ``None`` in a package without one.
        cache: to go on from.
    """

    logits: Floats
    hidden: Floats | None
    cache: PackageCache


class Package:
    """The decoder of a package on the CPU, and its prediction head where it has one.

    Attributes:
        config: of the checkpoint that was exported.
        end_tokens: ids that end a text.
    """

    config: ModelConfig
    end_tokens: tuple[int, ...]

    def __init__(self, folder: Path, *, threads: int = 0) -> None:
        """Load the decoder and its weights; ``threads`` 0 leaves their number to ONNX Runtime.

        Raises:
            SourceError: no package, or ONNX Runtime refuses it.
        """
        try:
            self.config = ModelConfig.from_file(folder / CONFIG_FILE)
        except ConfigError as error:
            raise SourceError(str(error)) from error
        if not (folder / MODEL_FILE).is_file():
            raise SourceError(f"{folder}: no {MODEL_FILE}, so no package; `qconvert export-onnx` makes one")
        self._folder, self._threads = folder, threads
        self.end_tokens = end_tokens(self.config.text, generation_config(folder))
        self._decoder = self._session(MODEL_FILE)

    @property
    def drafts(self) -> bool:
        """Whether it has a prediction head."""
        return (self._folder / MTP_FILE).is_file()

    @cached_property
    def _head(self) -> Session:
        """Loaded when it is first asked: it has embedding and head in memory once more, and most never draft."""
        return self._session(MTP_FILE)

    def _session(self, name: str) -> Session:
        return Session(self._folder / name, vocabulary=self.config.text.vocab_size, threads=self._threads)

    def forward(
        self,
        input_ids: Integers,
        *,
        attention_mask: Integers | None = None,
        position_ids: Integers | None = None,
        cache: PackageCache | None = None,
    ) -> PackageOutput:
        """Run tokens after those of ``cache``; every row as if it were alone.

        Args:
            input_ids: [B, S].
            attention_mask: [B, S], zero where these tokens are padding.
            position_ids: [3, B, S]; by default real tokens count on from the cache.
            cache: of the tokens before.

        Raises:
            UsageError: ids that are not of the vocabulary, or shapes that do not fit each other.
        """
        found, after = self._decoder.run(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, cache=cache, beside={}
        )
        return PackageOutput(logits=found[LOGITS], hidden=found.get(HIDDEN_STATES), cache=after)

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
