"""What each part of a converted model is worth, as a table in the terminal."""

from __future__ import annotations

from qconvert.cli import console
from qconvert.parity.attribution import Attribution, Worth

_SHOWN_LAYERS = 12


def show_attribution(found: Attribution) -> None:
    """Groups, then the layers that are worth most, then what the policy does about it."""
    if found.groups:
        console.say(f"KL as served is {found.kl:.5g} nats; with tensors of the original put back it is less:")
        table = console.plain_table("restored", ">KL less", ">95% interval", ">share", ">bytes")
        for one in found.groups:
            table.add_row(one.group, *_cells(one, found.kl))
        console.show(table)
    layers = sorted(found.layers, key=lambda one: -one.worth)
    if layers:
        table = console.plain_table("restored", ">layer", ">KL less", ">95% interval", ">share", ">bytes")
        for one in layers[:_SHOWN_LAYERS]:
            table.add_row(one.group, str(one.layer), *_cells(one, found.kl))
        console.show(table)
    if len(layers) > _SHOWN_LAYERS:
        console.say(f"... and {len(layers) - _SHOWN_LAYERS} more layers; --report or --json has them all")
    console.say(found.advice)


def _cells(one: Worth, kl: float) -> tuple[str, ...]:
    more = one.bytes_original - one.bytes_converted
    return (
        f"{one.worth:.3g}", f"{one.low:.2g} to {one.high:.2g}", f"{one.worth / kl:.1%}" if kl else "-",
        f"{'+' if more >= 0 else '-'}{console.gigabytes(abs(more))}",
    )  # fmt: skip
