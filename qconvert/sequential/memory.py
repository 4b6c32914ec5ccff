"""What a calibrated conversion holds at once, and what waits between its layers."""

from __future__ import annotations

from dataclasses import dataclass

from qconvert.core.errors import PlanError
from qconvert.sequential.experts import ROWS
from reference_model.config import TextConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Bytes.

    Attributes:
        work: in memory at once.
        waiting: of hidden states, and of what experts of a layer read and give; on disk what memory does not hold.
        kept: on disk, beside the output, for a run that goes on: the states before a layer while those behind it are
            written.
    """

    work: int
    waiting: int
    kept: int


def needs(config: TextConfig, jobs: int, tokens: int, tried: int = 0) -> Needs:
    """What text of so many ``tokens`` takes with ``jobs`` experts that are rounded at once.

    At work are a layer of 32-bit weights without its experts, and ``jobs`` experts. An expert takes its second moments
    in six places (summed up, blended, damped, split, turned around, in use), its matrices in four, and what it reads
    and gives for ``ROWS`` tokens twice. What heads give has more inputs, and is rounded alone. Where each token goes
    takes 32 bytes a visit: numbers of experts, their order, weights. ``tried`` factors of a layer's input are looked at
    at once, each with matrices of its own, and what it takes to round one.
    """
    hidden, width = config.hidden_size, config.moe_intermediate_size
    mixer = max(config.conv_dim + 2 * config.value_dim, 2 * config.query_dim + 2 * config.key_value_dim)
    layer = (mixer + config.query_dim + 3 * config.shared_expert_intermediate_size) * hidden
    expert = 6 * hidden**2 + 4 * 3 * width * hidden + 2 * ROWS * (hidden + 2 * width)
    heads = 6 * max(config.query_dim, config.value_dim) ** 2
    visits = 32 * tokens * (config.num_experts_per_tok + config.folded_experts)
    # in 32 bits the layer's input, what its first half gives and what experts give; in 16 what experts read
    return Needs(
        work=4 * (layer + 2 * hidden**2 + max(jobs * expert, heads, tried * 3 * mixer * hidden)) + visits,
        waiting=(3 * 4 + 2) * tokens * hidden,
        kept=2 * 4 * tokens * hidden,
    )


def check_room(config: TextConfig, jobs: int, memory: int, tokens: int, tried: int = 0) -> int:
    """What of ``memory`` is left for what waits; arguments as for ``needs``.

    Raises:
        PlanError: nothing is.
    """
    needed = needs(config, jobs, tokens, tried).work
    if needed > memory:
        raise PlanError(
            f"a layer and {jobs} experts that are rounded at once need {needed / 2**20:.0f} MiB, but only "
            f"{memory / 2**20:.0f} MiB are left of the memory limit: raise --max-memory, or give fewer --jobs or tokens"
        )
    return memory - needed
