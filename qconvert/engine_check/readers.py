"""Which modules each engine takes for quantized, by its own reading of the lists in ``quantization_config``.

Every reader answers for a module under its name in the checkpoint: ``True`` for quantized, ``False`` for dense,
``None`` where parts of a stack disagree and the engine gives up. They follow the engines' matching, not ours: a list
that means something else to an engine than to us is what this is about.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from qconvert.core.errors import SourceError
from qconvert.formats.engine_rules import STACKED, vllm_name

_STACKS: Mapping[str, tuple[str, ...]] = dict(STACKED)
_EXPERT_PARTS = ("gate_proj", "up_proj", "down_proj")


class Reader(Protocol):
    """How one engine reads the lists of one ``quant_method``."""

    def reads(self, name: str) -> bool | None:
        """Whether it takes the module, or stack, for quantized."""

    def reads_experts(self, block: str) -> bool | None:
        """Whether it takes a layer's routed experts, called ``...mlp.experts``, for quantized."""


@dataclass(frozen=True, slots=True)
class Entries:
    """Names and ``re:`` patterns of a list of compressed-tensors."""

    exact: frozenset[str]
    patterns: tuple[re.Pattern[str], ...]

    @classmethod
    def of(cls, entries: Iterable[str]) -> Entries:
        """The two kinds apart; patterns compiled once."""
        listed = tuple(entries)
        return cls(
            frozenset(entry for entry in listed if not entry.startswith("re:")),
            tuple(re.compile(entry[3:]) for entry in listed if entry.startswith("re:")),
        )

    def match(self, name: str, *, suffixes: bool = False) -> bool:
        """Equality or ``re.match``; with ``suffixes`` also an entry that is the end of ``name`` after a dot."""
        if name in self.exact or any(pattern.match(name) for pattern in self.patterns):
            return True
        return suffixes and any(name[at + 1 :] in self.exact for at, char in enumerate(name) if char == ".")


def parts_of(name: str) -> tuple[str, ...]:
    """The modules behind the name of a stack; nothing for another name."""
    stem, _, last = name.rpartition(".")
    return tuple(f"{stem}.{part}" for part in _STACKS.get(last, ()))


def together(answers: Sequence[bool]) -> bool | None:
    """What all say; ``None`` where they differ."""
    return answers[0] if len(set(answers)) == 1 else None


def _listed(block: Mapping[str, Any], *fields: str) -> tuple[str, ...]:
    """The first list among ``fields`` that is not empty."""
    return next((tuple(block[name]) for name in fields if block.get(name)), ())


def _targets(block: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(target for group in block["config_groups"].values() for target in group["targets"])


def in_vllm(name: str, *, mapped: bool) -> str:
    """VLLM's name of a module: one of a checkpoint without a vision tower stays."""
    return vllm_name(name) if mapped else name


@dataclass(frozen=True, slots=True)
class VllmCompressedTensors:
    """Exact entries are mapped, patterns are not; a stack is matched by its own name, then by those of its parts.

    Source: vLLM 0.32, compressed_tensors/utils.py ``should_ignore_layer`` and ``find_matched_target``,
    compressed_tensors_moe.py ``get_moe_method``.
    """

    block: Mapping[str, Any]
    mapped: bool
    ignore: Entries = field(init=False)
    targets: Entries = field(init=False)

    def __post_init__(self) -> None:
        """Map and compile the lists."""
        for name, entries in (("ignore", _listed(self.block, "ignore")), ("targets", _targets(self.block))):
            object.__setattr__(self, name, Entries.of(in_vllm(entry, mapped=self.mapped) for entry in entries))

    def reads(self, name: str) -> bool | None:
        """See ``Reader.reads``."""
        here = in_vllm(name, mapped=self.mapped)
        parts = parts_of(here)
        if self.ignore.match(here):
            return False
        ignored = together([self.ignore.match(part) for part in parts or (here,)])
        if ignored is not False:
            return None if ignored is None else False
        if "Linear" in self.targets.exact or self.targets.match(here):
            return True
        return bool(parts) and all(self.targets.match(part) for part in parts)

    def reads_experts(self, block: str) -> bool | None:
        """At expert 0's three matrices."""
        return together([bool(self.reads(f"{block}.0.{part}")) for part in _EXPERT_PARTS])


@dataclass(frozen=True, slots=True)
class SglangCompressedTensors:
    """Nothing is mapped; entries also match as the end of a name; the draft head knows no stacks' parts.

    Source: SGLang 0.5.23, compressed_tensors/utils.py ``should_ignore_layer`` and ``find_matched_target``,
    compressed_tensors.py ``get_moe_scheme``; models/qwen3_5_mtp.py has no ``packed_modules_mapping``.
    """

    block: Mapping[str, Any]
    ignore: Entries = field(init=False)
    targets: Entries = field(init=False)

    def __post_init__(self) -> None:
        """Compile the lists."""
        object.__setattr__(self, "ignore", Entries.of(_listed(self.block, "ignore")))
        object.__setattr__(self, "targets", Entries.of(_targets(self.block)))

    def reads(self, name: str) -> bool | None:
        """See ``Reader.reads``."""
        parts = () if name.startswith("mtp.") else parts_of(name)
        if parts and name not in self.ignore.exact:
            ignored = together([self.ignore.match(part, suffixes=True) for part in parts])
        else:
            ignored = self.ignore.match(name, suffixes=True)
        if ignored is not False:
            return None if ignored is None else False
        if "Linear" in self.targets.exact or self.targets.match(name):
            return True
        return bool(parts) and all(self.targets.match(part) for part in parts)

    def reads_experts(self, block: str) -> bool | None:
        """At expert 0's three matrices."""
        return together([bool(self.reads(f"{block}.0.{part}")) for part in _EXPERT_PARTS])


@dataclass(frozen=True, slots=True)
class VllmFp8:
    """Full names only, mapped; experts are dense when their block's name is inside an entry with ``experts``.

    Source: vLLM 0.32, fp8.py ``Fp8Config.get_quant_method``, utils/quant_utils.py ``is_layer_skipped``.
    """

    block: Mapping[str, Any]
    mapped: bool
    kept: frozenset[str] = field(init=False)
    blocks: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        """Map the list, once."""
        entries = _listed(self.block, "ignored_layers", "modules_to_not_convert")
        kept = frozenset(in_vllm(entry, mapped=self.mapped) for entry in entries)
        object.__setattr__(self, "kept", kept)
        object.__setattr__(
            self, "blocks", frozenset(e[: e.index("experts") + 7] for e in kept if ".experts" in e)
        )  # fmt: skip

    def reads(self, name: str) -> bool | None:
        """See ``Reader.reads``."""
        here = in_vllm(name, mapped=self.mapped)
        if here in self.kept:
            return False
        kept = together([part in self.kept for part in parts_of(here) or (here,)])
        return None if kept is None else not kept

    def reads_experts(self, block: str) -> bool | None:
        """By the block's name."""
        return in_vllm(block, mapped=self.mapped) not in self.blocks


@dataclass(frozen=True, slots=True)
class SglangFp8:
    """Names with and without ``model.``, matched at dots anywhere inside a module's name.

    Source: SGLang 0.5.23, fp8.py ``Fp8Config.from_config``, quantization/utils.py ``is_layer_skipped``.
    """

    block: Mapping[str, Any]
    kept: frozenset[str] = field(init=False)
    blocks: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        """Both variants of each name."""
        entries = _listed(self.block, "ignored_layers", "modules_to_not_convert")
        bare = [entry.removeprefix("model.").rstrip(".") for entry in entries]
        kept = frozenset((*bare, *(f"model.{entry}" for entry in bare)))
        object.__setattr__(self, "kept", kept)
        object.__setattr__(
            self, "blocks", frozenset(e[: e.index("experts") + 7] for e in kept if ".experts" in e)
        )  # fmt: skip

    def _inside(self, name: str) -> bool:
        steps = name.split(".")
        count = len(steps)
        return any(".".join(steps[i:j]) in self.kept for i in range(count) for j in range(i + 1, count + 1))

    def reads(self, name: str) -> bool | None:
        """See ``Reader.reads``."""
        kept = together([self._inside(part) for part in parts_of(name) or (name,)])
        return None if kept is None else not kept

    def reads_experts(self, block: str) -> bool | None:
        """By the block's name, inside an entry or around one."""
        return not (self._inside(block) or block in self.blocks)


@dataclass(frozen=True, slots=True)
class VllmGptq:
    """``-:`` patterns of ``dynamic`` against vLLM's names; linears that headers show as dense are dense anyway.

    Source: vLLM 0.32, utils/gptq_utils.py ``get_dynamic_override`` and ``get_linear_quant_method``, auto_gptq.py
    ``get_moe_quant_method`` and ``maybe_update_config``.
    """

    block: Mapping[str, Any]
    mapped: bool
    rules: tuple[tuple[bool, re.Pattern[str]], ...] = field(init=False)

    def __post_init__(self) -> None:
        """Compile the patterns; the first that matches decides."""
        rules = [(entry.startswith("-:"), re.compile(entry[2:] if entry[:2] in ("-:", "+:") else entry))
                 for entry in self.block.get("dynamic") or {}]  # fmt: skip
        object.__setattr__(self, "rules", tuple(rules))

    def reads(self, name: str) -> bool | None:
        """See ``Reader.reads``."""
        here = in_vllm(name, mapped=self.mapped)
        return not next((excluded for excluded, pattern in self.rules if pattern.match(here)), False)

    def reads_experts(self, block: str) -> bool | None:
        """By the block's name; those of the draft head are dense where any exclusion speaks of ``mtp``."""
        if block.startswith("mtp.") and any(excluded and "mtp" in pattern.pattern for excluded, pattern in self.rules):
            return False
        return self.reads(block)


@dataclass(frozen=True, slots=True)
class VllmAwq:
    """Parts of vLLM's names; without a list, what headers show.

    Source: vLLM 0.32, auto_awq.py ``AutoAWQConfig.get_quant_method`` and ``maybe_update_config``.
    """

    block: Mapping[str, Any]
    mapped: bool
    kept: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        """Map the list."""
        entries = _listed(self.block, "modules_to_not_convert")
        object.__setattr__(self, "kept", frozenset(in_vllm(entry, mapped=self.mapped) for entry in entries))

    def _inside(self, name: str) -> bool:
        return any(entry in name for entry in self.kept)

    def reads(self, name: str) -> bool | None:
        """See ``Reader.reads``."""
        here = in_vllm(name, mapped=self.mapped)
        if self._inside(here):
            return False
        kept = together([self._inside(part) for part in parts_of(here) or (here,)])
        return None if kept is None else not kept

    def reads_experts(self, block: str) -> bool | None:
        """By the block's name."""
        return self.reads(block)


@dataclass(frozen=True, slots=True)
class TransformersCompressedTensors:
    """Names of the checkpoint, equality or ``re.match``; experts follow the stored tensors, not the lists.

    Source: compressed-tensors 0.20, utils/match.py ``match_named_modules``, called by transformers 5.23,
    quantizer_compressed_tensors.py ``_process_model_before_weight_loading``.
    """

    block: Mapping[str, Any]
    ignore: Entries = field(init=False)
    targets: Entries = field(init=False)

    def __post_init__(self) -> None:
        """Compile the lists."""
        object.__setattr__(self, "ignore", Entries.of(_listed(self.block, "ignore")))
        object.__setattr__(self, "targets", Entries.of(_targets(self.block)))

    def reads(self, name: str) -> bool | None:
        """Of a single module: transformers stacks none."""
        return not self.ignore.match(name) and ("Linear" in self.targets.exact or self.targets.match(name))

    def reads_experts(self, block: str) -> bool | None:
        """Nothing is decided by lists."""
        return None


def _up_to_a_dot(entry: str) -> re.Pattern[str]:
    try:
        return re.compile(rf"(?:{entry})(?:(?<=\.)|(?=\.|$))")
    except re.error as error:
        raise SourceError(f"config.json: transformers takes {entry!r} in its list for a pattern: {error}") from None


@dataclass(frozen=True, slots=True)
class TransformersFp8:
    """Names from the start up to a dot, as patterns too, or the end of a name, dot or not.

    Source: transformers 5.23, quantizers/quantizers_utils.py ``should_convert_module``.
    """

    block: Mapping[str, Any]
    exact: frozenset[str] = field(init=False)
    loose: tuple[re.Pattern[str], ...] = field(init=False)
    ends: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        """Full names apart: they are many, and equality finds them.

        Raises:
            SourceError: an entry is a broken pattern, on which transformers stops as well.
        """
        entries = _listed(self.block, "modules_to_not_convert", "ignored_layers")
        loose = [
            entry for entry in entries if not entry.startswith(("model.", "mtp.")) or re.search(r"[*+?^$\\(\[|]", entry)
        ]
        object.__setattr__(self, "exact", frozenset(entries))
        object.__setattr__(self, "loose", tuple(_up_to_a_dot(entry) for entry in loose))
        object.__setattr__(self, "ends", tuple(loose))

    def reads(self, name: str) -> bool | None:
        """Of a single module: transformers stacks none."""
        steps = name.split(".")
        if any(".".join(steps[:i]) in self.exact for i in range(1, len(steps) + 1)):
            return False
        return not (name.endswith(self.ends) or any(pattern.match(name) for pattern in self.loose))

    def reads_experts(self, block: str) -> bool | None:
        """As any module."""
        return self.reads(block)
