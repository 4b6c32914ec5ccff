"""A picture of how many tokens experts got: a bar a layer, cut where they are none, few, fewer than inputs, enough."""

from __future__ import annotations

from qconvert.core.coverage import FEW, Coverage, LayerCoverage

_LEFT, _TOP, _WIDTH, _ROW = 120, 58, 560, 14
_CLASSES = (
    ("no token", "#b2182b"),
    (f"fewer than {FEW}", "#ef8a62"),
    ("fewer than inputs", "#fddbc7"),
    ("at least as many as inputs", "#2166ac"),
)


def picture(coverage: Coverage) -> str:
    """An SVG document."""
    title = f"Experts by the tokens that reached them, of {coverage.tokens:,}"
    height = _TOP + _ROW * len(coverage.layers) + 16
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_LEFT + _WIDTH + 20} {height}" '
        'font-family="sans-serif" font-size="11" role="img">',
        f"<title>{title}</title>",
        '<rect width="100%" height="100%" fill="#fff"/>',
        f'<text x="{_LEFT}" y="18" font-size="13">{title}</text>',
    ]
    across = _LEFT
    for label, colour in _CLASSES:
        parts.append(f'<rect x="{across}" y="28" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{across + 14}" y="37">{label}</text>')
        across += 34 + 6 * len(label)
    for n, layer in enumerate(coverage.layers):
        parts += _bar(layer, _TOP + n * _ROW)
    return "\n".join([*parts, "</svg>", ""])


def _bar(layer: LayerCoverage, top: int) -> list[str]:
    none = len(layer.unreached)
    scarce = max(layer.fewer_than_inputs - layer.few, 0)
    counts = (none, layer.few - none, scarce, layer.experts - layer.few - scarce)
    parts = [f'<text x="{_LEFT - 8}" y="{top + 10}" text-anchor="end">{layer.name}</text>']
    at = float(_LEFT)
    for count, (label, colour) in zip(counts, _CLASSES, strict=True):
        width = _WIDTH * count / layer.experts
        if count:
            parts.append(
                f'<rect x="{at:.1f}" y="{top}" width="{width:.1f}" height="{_ROW - 3}" fill="{colour}">'
                f"<title>{layer.name}: {count} experts with {label}</title></rect>"
            )
        at += width
    return parts
