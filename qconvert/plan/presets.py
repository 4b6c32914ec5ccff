"""Named sets of rules beside the default ones."""

from __future__ import annotations

from collections.abc import Callable

from qconvert.core.errors import UsageError
from qconvert.core.scheme import INT8, Scheme
from qconvert.plan.policy import Rule

_SHARED = ("text.shared_expert.gate", "text.shared_expert.up", "text.shared_expert.down")
_ATTENTION = tuple(f"text.attention.{part}" for part in ("query", "key", "value", "output"))
_LINEAR_ATTENTION = tuple(f"text.linear_attention.{part}" for part in ("qkv", "z", "output"))


def preset_rules(name: str, scheme: Scheme) -> tuple[Rule, ...]:
    """The rules that go before the default ones, whose routed experts are in ``scheme``.

    ``fusable``: the shared expert like a routed one, so that SGLang can run it as one of them. ``mixed``: attention,
    linear attention and shared expert in 8 bits; in ``scheme`` itself where that has 8, else in int8, for engines read
    one ``quant_method``.

    Raises:
        UsageError: an unknown name.
    """
    if name not in _PRESETS:
        raise UsageError(f"preset {name!r} is unknown; expected one of {', '.join(PRESET_NAMES)}")
    return _PRESETS[name](scheme)


def _fusable(scheme: Scheme) -> tuple[Rule, ...]:
    return _rules(_SHARED, scheme, "as the routed experts, so that engines can run it as one of them")


def _mixed(scheme: Scheme) -> tuple[Rule, ...]:
    wide = scheme if scheme.weight_bits == 8 else INT8
    return _rules((*_ATTENTION, *_LINEAR_ATTENTION, *_SHARED), wide, "always active: sensitive, 8 bits")


def _rules(matches: tuple[str, ...], scheme: Scheme, reason: str) -> tuple[Rule, ...]:
    return tuple(Rule(match=match, scheme=scheme, reason=reason, default=True) for match in matches)


_PRESETS: dict[str, Callable[[Scheme], tuple[Rule, ...]]] = {"fusable": _fusable, "mixed": _mixed}
PRESET_NAMES = tuple(_PRESETS)
