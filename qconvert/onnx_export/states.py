"""What a decoder keeps between calls, under the names of onnxruntime-genai."""

from __future__ import annotations

from dataclasses import dataclass

from reference_model.config import TextConfig

LOGITS = "logits"

INPUT_IDS = "input_ids"

INPUTS_EMBEDS = "inputs_embeds"
"""Output of the embedding graph, and input of the decoder of a package with images."""

IMAGE_FEATURES = "image_features"
"""Output of the vision tower, and input of the embedding graph."""

PIXEL_VALUES = "pixel_values"
IMAGE_GRID = "image_grid_thw"
"""Inputs of the vision tower."""

HIDDEN_STATES = "hidden_states"
"""Output of the decoder, and input of the prediction head."""

HIDDEN_OUT = "hidden_states_out"
"""Output of the prediction head."""

PAST = "past"
"""What the names of states that are given begin with."""

ROUTER = "router"

TAPS = ("mixer", "moe", ROUTER, "hidden")
"""What a decoder with taps gives of each layer besides: what attention or linear attention, and the experts, add to the
hidden states [B, S, D], the router's logits [B, S, E], and the hidden states after the layer [B, S, D]."""

GROWS = "tokens"
"""Stands for the dimension of a state that counts tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """One tensor that a call takes and gives back.

    Attributes:
        past: name of the input.
        present: name of the output.
        dims: sizes after the batch; ``GROWS`` for one that counts tokens.
    """

    past: str
    present: str
    dims: tuple[int | str, ...]

    @property
    def grows(self) -> bool:
        """Whether it holds something of every token: keys or values."""
        return GROWS in self.dims

    def shape(self, tokens: str) -> tuple[int | str, ...]:
        """Of the whole tensor, with names for what varies: ``tokens`` for how many there are."""
        return ("batch", *(tokens if dim == GROWS else dim for dim in self.dims))


def layer_states(config: TextConfig, layer: int) -> tuple[State, State]:
    """Keys and values [B, M, tokens, K], or the convolution [B, C, W - 1] and the memory [B, Hv, dk, dv]."""
    if config.layer_types[layer] == "full_attention":
        return attention_states(config, layer)
    memory = (config.linear_num_value_heads, config.linear_key_head_dim, config.linear_value_head_dim)
    return (
        _state(f"past.{layer}.conv", (config.conv_dim, config.linear_conv_kernel_dim - 1)),
        _state(f"past.{layer}.recurrent", memory),
    )


def attention_states(config: TextConfig, layer: int) -> tuple[State, State]:
    """Keys and values [B, M, tokens, K]."""
    dims: tuple[int | str, ...] = (config.num_key_value_heads, GROWS, config.head_dim)
    return _state(f"past_key_values.{layer}.key", dims), _state(f"past_key_values.{layer}.value", dims)


def tap_name(layer: int, tap: str) -> str:
    """The name of the output that one of ``TAPS`` comes out at."""
    return f"taps.{layer}.{tap}"


def present_of(past: str) -> str:
    """The name under which a state comes back."""
    return "present" + past.removeprefix(PAST).removeprefix("_key_values")


def _state(past: str, dims: tuple[int | str, ...]) -> State:
    return State(past=past, present=present_of(past), dims=dims)
