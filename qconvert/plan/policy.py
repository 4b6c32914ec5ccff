"""Ordered rules from roles to actions: the first rule that matches a tensor decides it.

A policy file is TOML::

    [[rule]]
    match = "text.shared_expert.*"   # glob over role paths, see `qconvert inspect`
    scheme = "int8"                  # int4, int8, w8a8, fp8, fp8-block, mxfp4, nvfp4; or keep = true
    layers = "0-3,39"                # optional
    reason = "always active"         # optional

``group``, ``symmetric`` and ``search`` refine ``scheme``; ``format`` names the loader that shall read it, ``engine``
the engine that alone shall (``vllm``), whose rules are then the only ones that must hold. Rules of a file are tried
before the default ones. The halves of ``q_proj`` have paths of their own beside that of the whole,
``text.attention.query.query`` and ``text.attention.query.output_gate``; see ``halves.py`` for what decides both.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tomlkit
import xxhash
from tomlkit.exceptions import TOMLKitError

from qconvert.core.errors import FormatError, PlanError, UsageError
from qconvert.core.role import HALVES, TensorRole
from qconvert.core.scheme import FP8, FP8_BLOCK, INT8, LLM_INT8, MXFP4, NVFP4, W8A8, Codebook, Scheme, bnb4, int4
from qconvert.formats.engine_rules import ALONE
from qconvert.formats.table import METHODS, scheme_for
from qconvert.io.strict_table import Types, check_table

SCHEME_NAMES = ("int4", "int8", "w8a8", "fp8", "fp8-block", "mxfp4", "nvfp4", "nf4", "fp4", "llm-int8")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One line of a policy.

    Attributes:
        match: shell-style pattern over ``TensorRole.path``.
        scheme: how to round what matches; ``None`` keeps it as it is.
        layers: the layers that the rule speaks of; ``None`` is all of them.
        search: choose scales by mean squared error.
        method: the loader that shall read what is rounded, as ``quantization_config`` names it; ``None`` is the usual
            one of the scheme.
        engine: the engine that alone shall read what is rounded, one of ``engine_rules.ALONE``.
        default: one of the built-in rules, which need not decide anything.
    """

    match: str
    scheme: Scheme | None
    reason: str
    layers: frozenset[int] | None = None
    search: bool = False
    method: str | None = None
    engine: str | None = None
    default: bool = False

    def matches(self, role: TensorRole) -> bool:
        """Whether the rule speaks of ``role``, or of the whole that it is a half of."""
        if self.layers is not None and role.layer not in self.layers:
            return False
        return fnmatch.fnmatchcase(role.path, self.match) or (role.part in HALVES and self.matches(role.whole))


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Ordered rules that decide every role."""

    rules: tuple[Rule, ...]

    def decide(self, role: TensorRole) -> Rule:
        """The first rule that matches.

        Raises:
            PlanError: none does.
        """
        for rule in self.rules:
            if rule.matches(role):
                return rule
        raise PlanError(f"no rule of the policy decides {role}")

    @property
    def hash(self) -> str:
        """xxh3-128 of the rules."""
        rules = [(r.match, r.scheme, sorted(r.layers or ()), r.search, r.method) for r in self.rules]
        return xxhash.xxh3_128_hexdigest(repr((rules, self.engine) if self.engine else rules).encode())

    @property
    def engine(self) -> str | None:
        """The engine that alone shall read the output, if a rule names one."""
        return next((rule.engine for rule in self.rules if rule.engine is not None), None)

    def stored_as(self, method: str) -> Policy:
        """The same rules with ``method`` for the loader wherever none is named.

        Raises:
            UsageError: no such loader.
            FormatError: it has no format for one of the schemes.
        """
        return Policy(rules=tuple(_stored_as(rule, method) for rule in self.rules))

    def entries(self) -> list[dict[str, Any]]:
        """The rules as a policy file would hold them; a scheme that no file can name appears as it prints."""
        return [_entry(rule) for rule in self.rules]

    @classmethod
    def of_entries(cls, entries: Sequence[Any], where: str) -> Policy:
        """The inverse of ``entries``; ``where`` begins the message of an error.

        Raises:
            UsageError: an entry is malformed, or names a scheme that no policy file can.
        """
        rules = [_rule(entry, f"{where}, rule {i}", search=False) for i, entry in enumerate(entries, start=1)]
        # They have decided once: a rule that decides nothing is none of the reader's making.
        return cls(rules=tuple(replace(rule, default=True) for rule in rules))


def scheme_named(name: str, *, group: int | None = None, symmetric: bool = True) -> Scheme:
    """The scheme that a user asks for.

    Raises:
        UsageError: an unknown name, or an option that the scheme does not have.
    """
    if name not in SCHEME_NAMES:
        raise UsageError(f"scheme {name!r} is unknown; expected one of {', '.join(SCHEME_NAMES)}")
    if name == "int4":
        size = 128 if group is None else group
        if size not in (32, 64, 128):
            raise UsageError(f"group {size} is not supported for int4; expected 32, 64 or 128")
        return int4(size, symmetric=symmetric)
    if group is not None:
        raise UsageError(f"scheme {name!r} has no groups; drop the group of {group}")
    if not symmetric:
        raise UsageError(f"scheme {name!r} is symmetric only")
    if name in ("nf4", "fp4"):
        return bnb4("nf4" if name == "nf4" else "fp4")
    return {
        "int8": INT8,
        "w8a8": W8A8,
        "fp8": FP8,
        "fp8-block": FP8_BLOCK,
        "mxfp4": MXFP4,
        "nvfp4": NVFP4,
        "llm-int8": LLM_INT8,
    }[name]


_ALWAYS_ACTIVE = "always active: few bytes, high sensitivity"

_KEPT = (
    ("mtp.*", "drafts from few bits are rejected: acceptance falls to zero"),
    ("vision.*", "the vision tower is small and engines expect it unquantized"),
    ("text.router", "routing decides which experts run; engines keep it in 16 bits"),
    ("text.shared_expert_gate", "one row; engines keep it in 16 bits"),
    ("text.shared_expert.*", _ALWAYS_ACTIVE),
    ("text.attention.*norm", "a vector"),
    ("text.attention.*", _ALWAYS_ACTIVE),
    ("text.linear_attention.a_log", "the decay is never cast"),
    ("text.linear_attention.dt_bias", "the decay is never cast"),
    ("text.linear_attention.conv", "four taps a channel"),
    ("text.linear_attention.norm", "a vector"),
    ("text.linear_attention.[ab]", "decay and write strength: one row a head"),
    ("text.linear_attention.*", _ALWAYS_ACTIVE),
    ("text.*norm", "a vector"),
    ("text.embedding", "a lookup: bits saved here cost quality everywhere"),
    ("text.head", "logits are as good as their last matrix"),
)


_DENSE_ONLY = (bnb4("nf4"), bnb4("fp4"), LLM_INT8)
_DENSE = (
    "text.attention.query",
    "text.attention.key",
    "text.attention.value",
    "text.attention.output",
    "text.linear_attention.qkv",
    "text.linear_attention.z",
    "text.linear_attention.output",
    "text.shared_expert.gate",
    "text.shared_expert.up",
    "text.shared_expert.down",
)
_KEPT_DENSE = (
    ("text.expert.*", "bitsandbytes' loaders round linear modules only, and experts are none to them"),
    ("text.attention.query", "half of its rows are the output gate, which four-bit floats ruin"),
    ("text.attention.key", "engines stack it with the query"),
    ("text.attention.value", "engines stack it with the query"),
)


def default_policy(scheme: Scheme, *, search: bool = False, rules: tuple[Rule, ...] = ()) -> Policy:
    """Routed experts in ``scheme``, everything else as it is; ``rules`` come first.

    bitsandbytes' schemes are for everything but routed experts and, in four bits, what is stacked with the queries.

    Raises:
        UsageError: ``search`` with a scheme that has no scales to choose.
    """
    _check_search(scheme, search)
    if scheme not in _DENSE_ONLY:
        reason = "routed experts: most bytes, least sensitive"
        rounded = [Rule(match="text.expert.*", scheme=scheme, reason=reason, search=search, default=True)]
        keeping = list(_KEPT)
    else:
        matches = _DENSE[3:] if isinstance(scheme.grid, Codebook) else _DENSE
        reason = "a linear module, which bitsandbytes' loaders know"
        rounded = [Rule(match=match, scheme=scheme, reason=reason, default=True) for match in matches]
        keeping = [*_KEPT_DENSE, *_KEPT]
    kept = tuple(Rule(match=match, scheme=None, reason=reason, default=True) for match, reason in keeping)
    return Policy(rules=(*rules, *rounded, *kept))


def _check_search(scheme: Scheme, search: bool) -> None:
    if search and scheme in _DENSE_ONLY:
        raise UsageError(f"scheme {scheme} takes its scales from the largest values: drop the search")


def read_rules(path: Path, *, search: bool = False) -> tuple[Rule, ...]:
    """Rules of a policy file, in their order.

    Raises:
        UsageError: the file cannot be read, or a rule is malformed; the message counts the rule.
    """
    try:
        document = tomlkit.parse(path.read_text(encoding="utf-8")).unwrap()
    except OSError as error:
        raise UsageError(f"cannot read policy {path}: {error.strerror}") from error
    except (TOMLKitError, UnicodeDecodeError) as error:
        raise UsageError(f"policy {path} is not TOML: {error}") from error
    entries = document.get("rule")
    if set(document) != {"rule"} or not isinstance(entries, list):
        raise UsageError(f"policy {path} must hold [[rule]] tables and nothing else; found {sorted(document)}")
    return tuple(_rule(entry, f"policy {path}, rule {i}", search) for i, entry in enumerate(entries, start=1))


_TYPES: Types = {
    "match": (str,),
    "scheme": (str,),
    "keep": (bool,),
    "group": (int,),
    "symmetric": (bool,),
    "search": (bool,),
    "format": (str,),
    "engine": (str,),
    "layers": (str,),
    "reason": (str,),
}


def _rule(entry: Any, where: str, search: bool) -> Rule:
    check_table(entry, _TYPES, where)
    if "match" not in entry:
        raise UsageError(f"{where}: no 'match'")
    keep = entry.get("keep", False)
    if keep == ("scheme" in entry):
        raise UsageError(f"{where}: give either 'scheme' or 'keep = true'")
    if keep and {"group", "symmetric", "search", "format", "engine"} & set(entry):
        raise UsageError(f"{where}: 'keep' takes no group, symmetric, search, format or engine")
    if entry.get("engine", ALONE[0]) not in ALONE:
        raise UsageError(f"{where}: engine is {entry['engine']!r}; expected {' or '.join(ALONE)}")
    try:
        scheme = (
            None
            if keep
            else scheme_named(entry["scheme"], group=entry.get("group"), symmetric=entry.get("symmetric", True))
        )
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    if scheme is not None:
        _check_search(scheme, entry.get("search", False))
    rule = Rule(
        match=entry["match"],
        scheme=scheme,
        reason=entry.get("reason", where.rpartition(", ")[2] + " of the policy file"),
        layers=_layers(entry["layers"], where) if "layers" in entry else None,
        search=entry.get("search", search and scheme not in _DENSE_ONLY),
        engine=entry.get("engine"),
    )
    try:
        return _stored_as(rule, entry["format"]) if "format" in entry else rule
    except (UsageError, FormatError) as error:
        raise UsageError(f"{where}: {error}") from None


def _stored_as(rule: Rule, method: str) -> Rule:
    if method not in METHODS:
        raise UsageError(f"format {method!r} is unknown; expected one of {', '.join(METHODS)}")
    if rule.scheme is None or rule.method is not None:
        return rule
    return replace(rule, scheme=scheme_for(rule.scheme, method), method=method)


def _entry(rule: Rule) -> dict[str, Any]:
    entry: dict[str, Any] = {"match": rule.match}
    if rule.scheme is None:
        entry["keep"] = True
    else:
        entry |= _named(rule.scheme, rule.method)
        entry["search"] = rule.search
        entry |= {} if rule.engine is None else {"engine": rule.engine}
    if rule.layers is not None:
        entry["layers"] = layer_ranges(rule.layers)
    return {**entry, "reason": rule.reason}


_SAYABLE: tuple[tuple[Scheme, dict[str, Any]], ...] = (
    *((scheme_named(name), {"scheme": name}) for name in SCHEME_NAMES if name != "int4"),
    *(
        (int4(group, symmetric=symmetric), {"scheme": "int4", "group": group, "symmetric": symmetric})
        for group in (32, 64, 128)
        for symmetric in (True, False)
    ),
)
"""What policy files can say beside the name of a loader, and what it means."""


def _named(scheme: Scheme, method: str | None) -> dict[str, Any]:
    """How a policy file says it; a scheme that none can name appears as it prints."""
    for said, entry in _SAYABLE:
        if scheme == said and method is None:
            return entry
        with suppress(FormatError):
            if method is not None and scheme == scheme_for(said, method):
                return {**entry, "format": method}
    return {"scheme": str(scheme)}


_LAST_LAYER = 9999


def layer_ranges(layers: Iterable[int]) -> str:
    """Layers as a policy file names them: ``0-3,39``."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and runs[-1][1] == layer - 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _layers(text: str, where: str) -> frozenset[int]:
    layers: set[int] = set()
    for piece in text.split(","):
        first, dash, last = piece.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UsageError(f"{where}: layers is {text!r}; expected something like '0-3,39'")
        begin, end = int(first), int(last if dash else first)
        if not begin <= end <= _LAST_LAYER:
            raise UsageError(f"{where}: layers {piece.strip()!r} is no range within 0-{_LAST_LAYER}")
        layers.update(range(begin, end + 1))
    return frozenset(layers)
