"""The first half of a layer: what reads its input is rounded, then what reads the heads' outputs.

Shapes: B windows, T tokens of a window, N tokens in all, D hidden, K inputs of a matrix.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass

from torch import Tensor, nn

from qconvert.arch.names import Naming, module_of, name_of
from qconvert.core.awq_fold import AwqFold
from qconvert.core.plan import Step
from qconvert.core.role import Kind
from qconvert.core.scheme import Scheme
from qconvert.execute import Folded
from qconvert.numerics.awq import best_of, candidates, powers_of_two, repeated_places, scaled_loss, value_places
from qconvert.numerics.gptq import row_losses
from qconvert.numerics.hessian import Factor, Moments, blended, factorize, no_moments
from qconvert.numerics.rounding import quantize
from qconvert.numerics.threads import in_order
from qconvert.sequential.places import LayerSteps
from qconvert.sequential.rounder import Way, to_nearest
from qconvert.sequential.scaling import as_kept, as_rounded, scale_norm, scheme_of, squared, told
from qconvert.sequential.shop import Shop, evenly, put_weight
from reference_model.layer import DecoderLayer
from reference_model.layerwise import HiddenStates
from reference_model.span import place_tokens

TRIED_TOKENS = 4096
"""Tokens, about, whose outputs decide by what the layer's input is scaled: each of 20 trials runs the mixer on them."""


def round_mixer(shop: Shop, layer: DecoderLayer, steps: LayerSteps, hidden: HiddenStates) -> None:
    """Round what reads the layer's input, then what reads the heads' outputs, as the layer gives them by then.

    Args:
        shop: what to work with.
        layer: gets the weights that are written, unless the layers behind shall see the original's.
        steps: what to round, and what to scale for it.
        hidden: the layer's inputs [B, T, D].
    """
    half = _Half(shop, layer, steps, hidden)
    half.round_inputs()
    half.round_outputs()


class _Half:
    """The first half of one layer."""

    def __init__(self, shop: Shop, layer: DecoderLayer, steps: LayerSteps, hidden: HiddenStates) -> None:
        self._shop, self._layer, self._steps, self._hidden = shop, layer, steps, hidden
        self._mixer: nn.Module
        self._last: nn.Linear
        if layer.layer_type == "linear_attention":
            self._mixer, self._last = layer.linear_attn, layer.linear_attn.out_proj
        else:
            self._mixer, self._last = layer.self_attn, layer.self_attn.o_proj
        self._behind: Tensor | None = None
        """What columns of the last matrix are multiplied by, [K]."""

    def round_inputs(self) -> None:
        """What reads the layer's input, which a norm may scale, and of which v may be scaled against o."""
        over, said = self._scale_values() if self._folds_values else (None, None)
        columns: Tensor | None = None
        moments = no_moments(0)
        if self._steps.mixer:
            moments = self._moments(lambda b: self._layer.input_layernorm(self._hidden[b]).flatten(0, 1))
            columns = self._scale_inputs(moments)
        for step in self._steps.kept(*AwqFold.INPUT.parts.readers):
            is_v = step.role.kind is Kind.ATTENTION_VALUE
            meaning = self._shop.rounder.rescale(
                step,
                columns=columns,
                over=over if is_v else None,
                wanted=self._shop.calibration.propagate,
                folded=said if is_v else None,
            )
            self._show(step, meaning)
        if not self._steps.mixer:
            return
        way, support = self._shop.way(moments, columns=columns)
        way_of_v, _ = self._shop.way(moments, columns=columns, over=over)

        def rounded(step: Step) -> Tensor:
            if step.role.kind is Kind.ATTENTION_VALUE:
                return self._round(step, way_of_v, moments.tokens, support, said)
            return self._round(step, way, moments.tokens, support)

        self._round_all(self._steps.mixer, rounded)

    def round_outputs(self) -> None:
        """What reads the heads' outputs."""
        if not self._steps.mixed:
            return
        moments = self._mixed_moments()
        self._scale_heads(moments)
        losses = (0.0, 0.0)
        if self._behind is not None:
            last = self._read(moments)
            nearest = quantize(last.w, last.scheme, search=True).quantized.dequantize()
            losses = float(row_losses(nearest - last.w, last.factor).sum()), last.loss(self._behind)
        way, support = self._shop.way(moments, columns=self._behind, losses=losses)
        self._round_all(self._steps.mixed, lambda step: self._round(step, way, moments.tokens, support))

    @property
    def _folds_values(self) -> bool:
        return (
            self._layer.layer_type == "full_attention"
            and self._shop.calibration.folds_by(AwqFold.VALUE)
            and bool(self._steps.mixed)
        )

    def _scale_inputs(self, moments: Moments) -> Tensor | None:
        """Divide the norm and say what columns of its readers are multiplied by, [D]; ``None`` where it stays."""
        norm = self._steps.norm(AwqFold.INPUT)
        if norm is None:
            return None
        weight = self._shop.weights.raw(norm.role)
        found = scale_norm(AwqFold.INPUT, weight, moments.mean_abs, lambda tried: self._tried(tried, moments))
        self._shop.rounder.replace(norm, found.weight, found.folded)
        return found.columns

    def _scale_values(self) -> tuple[Tensor, Folded]:
        """What rows of v are divided by, [N]; columns of o are multiplied by the same.

        Of a v that keeps its bits these are powers of two, which change none.
        """
        config = self._shop.weights.config.text
        moments = self._mixed_moments()
        last = self._read(moments)
        places = value_places(config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        tried = candidates(moments.mean_abs, places=places)
        if self._steps.kept(Kind.ATTENTION_VALUE):
            tried = tuple(powers_of_two(s) for s in tried)
        found = best_of(tried, [last.loss(s[places]) for s in tried])
        self._behind = found.factors[places]
        return found.factors, told(AwqFold.VALUE, found)

    def _scale_heads(self, moments: Moments) -> None:
        """Divide the norm of the delta rule's heads, if it is to be."""
        norm = self._steps.norm(AwqFold.LINEAR_NORM)
        if norm is None:
            return
        config, weight, last = self._shop.weights.config.text, self._shop.weights.raw(norm.role), self._read(moments)
        places = repeated_places(config.linear_num_value_heads, config.linear_value_head_dim)
        found = scale_norm(
            AwqFold.LINEAR_NORM, weight, moments.mean_abs, lambda tried: [last.loss(s[places]) for s in tried],
            places=places,
        )  # fmt: skip
        self._shop.rounder.replace(norm, found.weight, found.folded)
        self._behind = found.columns[places]

    def _read(self, moments: Moments) -> _Last:
        """The last matrix beside what it reads."""
        hessian = blended(moments)
        return _Last(
            w=self._last.weight.detach(),
            scheme=scheme_of(self._steps.mixed[0]),
            factor=factorize(hessian, damping=self._shop.calibration.damping),
            mean_squares=hessian.matrix.diagonal(),
        )

    def _tried(self, tried: Sequence[Tensor], moments: Moments) -> list[float]:
        """Squared error of what the mixer gives, for each of several factors of its inputs, over some windows."""
        hessian = blended(moments)
        sample = [(normal, self._run(self._mixer, normal)) for normal in self._sample()]

        def loss(columns: Tensor) -> float:
            own = deepcopy(self._mixer, {id(weight): weight for weight in self._mixer.parameters()})
            way = to_nearest(hessian, columns=columns)
            for step in self._steps.mixer:
                linear = _linear(own, step)
                put_weight(linear, as_rounded(step, way, linear.weight.detach()))
            for step in self._steps.kept(*AwqFold.INPUT.parts.readers):
                linear = _linear(own, step)
                put_weight(linear, as_kept(step, linear.weight.detach(), columns))
            return sum(squared(self._run(own, normal) - given) for normal, given in sample)

        return list(in_order(self._shop.pool, loss, tried, self._shop.jobs))

    def _sample(self) -> Iterator[Tensor]:
        """Normed inputs [B, T, D] of some batches, evenly over all."""
        tokens = self._hidden[0].shape[0] * self._hidden[0].shape[1]
        for b in evenly(len(self._hidden), max(1, TRIED_TOKENS // tokens)).tolist():
            rows = max(1, TRIED_TOKENS // self._hidden[b].shape[1])
            yield self._layer.input_layernorm(self._hidden[b][:rows])

    def _run(self, mixer: nn.Module, normal: Tensor) -> Tensor:
        given: Tensor = mixer(normal, place_tokens(self._shop.weights.config.text, normal))[0]
        return given

    def _mixed_moments(self) -> Moments:
        """Of what the heads give."""
        seen = threading.local()

        def remember(module: nn.Module, args: tuple[Tensor]) -> None:
            seen.x = args[0]

        def mixed(b: int) -> Tensor:
            self._run(self._mixer, self._layer.input_layernorm(self._hidden[b]))
            given: Tensor = seen.x
            return given.flatten(0, 1)

        with _watched(self._last, remember):
            return self._moments(mixed)

    def _moments(self, inputs: Callable[[int], Tensor]) -> Moments:
        """Of ``inputs`` [N, K] of all batches."""
        found: Moments | None = None
        for rows in in_order(self._shop.pool, inputs, range(len(self._hidden)), self._shop.jobs):
            found = (no_moments(rows.shape[1]) if found is None else found).add(rows)
        return no_moments(0) if found is None else found

    def _round(self, step: Step, way: Way, tokens: int, support: str, folded: Folded | None = None) -> Tensor:
        wanted = self._shop.calibration.propagate
        return self._shop.rounder.round(step, way, tokens, support, wanted=wanted, folded=folded)

    def _round_all(self, steps: Sequence[Step], rounded: Callable[[Step], Tensor]) -> None:
        for step, meaning in zip(steps, in_order(self._shop.pool, rounded, steps, self._shop.jobs), strict=True):
            self._show(step, meaning)

    def _show(self, step: Step, meaning: Tensor) -> None:
        if self._shop.calibration.propagate:
            put_weight(_linear(self._mixer, step), meaning)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Last:
    """The matrix that reads the heads' outputs, and what these are like."""

    w: Tensor
    scheme: Scheme
    factor: Factor
    mean_squares: Tensor

    def loss(self, columns: Tensor) -> float:
        """Squared error of its outputs if it is rounded between these factors [K]."""
        return scaled_loss(self.w, self.scheme, columns, self.factor, mean_squares=self.mean_squares)


def _linear(mixer: nn.Module, step: Step) -> nn.Linear:
    """The module of a mixer whose matrix a step writes."""
    module = mixer.get_submodule(module_of(name_of(step.role, Naming.TEXT)).rpartition(".")[2])
    if not isinstance(module, nn.Linear):
        raise TypeError(f"{step.key} is no linear module")
    return module


@contextmanager
def _watched(module: nn.Module, hook: Callable[[nn.Module, tuple[Tensor]], None]) -> Iterator[None]:
    watching = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        watching.remove()
