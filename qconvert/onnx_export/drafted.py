"""Greedy text with the prediction head: it guesses the token after the next one, and the decoder runs both at once.

The memory of linear attention cannot be cut back. So after a wrong guess the decoder goes on from the cache before it,
and runs the tokens since then again together with the next guess.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from qconvert.core.errors import UsageError
from qconvert.onnx_export.runtime import Package, PackageOutput
from qconvert.onnx_export.session import Floats, Integers, PackageCache

AGAIN = 4
"""Tokens that are run again with each guess, at most: more are run once without one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafted:
    """A text without its prompt.

    Attributes:
        drafted: guesses.
        accepted: those that were right.
    """

    tokens: list[int]
    drafted: int
    accepted: int


class Drafter:
    """The prediction head, which follows every token that the decoder has run."""

    def __init__(self, package: Package) -> None:
        """Start without a token.

        Raises:
            UsageError: the package has no prediction head.
        """
        if not package.drafts:
            raise UsageError("the package has no prediction head to draft with: export it with one, or do not draft")
        self._package = package
        self._cache: PackageCache | None = None
        self._hidden: Floats | None = None

    def follow(self, out: PackageOutput, ids: Integers, first: int = 0) -> None:
        """Take what the decoder made of tokens ``first`` and later of ids [1, S], all that ``out`` starts with.

        Raises:
            UsageError: the package scores the last token of a call alone.
        """
        if out.hidden is None or out.logits.shape[1] == 1 < out.hidden.shape[1]:
            raise UsageError("the package scores the last token of a call alone, and drafts need each one's score")
        hidden, ids = out.hidden[:, first : ids.shape[1]], ids[:, first:]
        if self._hidden is not None:
            self._run(np.concatenate((self._hidden, hidden[:, :-1]), axis=1), ids)
        elif ids.shape[1] > 1:
            self._run(hidden[:, :-1], ids[:, 1:])
        self._hidden = hidden[:, -1:]

    def guess(self, token: int) -> int:
        """The token after ``token``, which follows those that the decoder has run.

        Raises:
            UsageError: it has run none.
        """
        if self._hidden is None:
            raise UsageError("the decoder has run no token to guess from")
        out = self._package.draft(self._hidden, np.asarray([[token]], dtype=np.int64), cache=self._cache)
        return int(out.logits[0, -1].argmax())

    def _run(self, hidden: Floats, next_ids: Integers) -> None:
        self._cache = self._package.draft(hidden, next_ids, cache=self._cache).cache


def go_on(
    package: Package,
    drafter: Drafter,
    out: PackageOutput,
    *,
    max_tokens: int,
    progress: Callable[[int], None],
) -> Drafted:
    """Generate after a prompt, of which ``out`` is what the decoder made, and which ``drafter`` has followed.

    Raises:
        UsageError: see ``Drafter``.
    """
    tokens = [int(out.logits[0, -1].argmax())]
    cache, again, followed = out.cache, list(tokens), 0
    drafted = accepted = 0
    while len(tokens) < max_tokens and tokens[-1] not in package.end_tokens:
        alone = len(again) > AGAIN or len(tokens) + 1 == max_tokens
        guesses = [] if alone else [drafter.guess(again[-1])]
        ids = np.asarray([again + guesses], dtype=np.int64)
        ran = package.forward(ids, cache=cache)
        chosen = [int(token) for token in ran.logits[0, len(again) - 1 :].argmax(-1)]
        right = chosen[:1] == guesses
        drafted, accepted = drafted + len(guesses), accepted + right
        drafter.follow(ran, ids if right else ids[:, : len(again)], followed)
        for token in chosen if right else chosen[:1]:
            if tokens[-1] not in package.end_tokens:
                tokens.append(token)
        if right or not guesses:
            cache, again, followed = ran.cache, [chosen[-1]], 0
        else:
            again, followed = [*again, chosen[0]], len(again)
        progress(len(tokens))
    return Drafted(tokens=tokens, drafted=drafted, accepted=accepted)
