"""Curves as SVG, for the documents: a panel for each experiment, accuracy over what was removed."""

from __future__ import annotations

from collections.abc import Mapping

Curves = Mapping[str, Mapping[int, float]]
"""Name -> percent removed -> accuracy in 0..1."""


def panels(
    found: Mapping[str, Curves],
    colours: Mapping[str, str],
    across_label: str,
    spread: Mapping[str, Mapping[str, Mapping[int, float]]] | None = None,
    ticks: int = 1,
) -> str:
    """An SVG document. spread: half the height of a bar at each point; ticks: every how many-th point is labelled."""
    width, height, left, top = 360, 250, 48, 34
    drawn = []
    for index, (name, curves) in enumerate(found.items()):
        targets = sorted(next(iter(curves.values())))
        low = min(min(curve.values()) for curve in curves.values())
        high = max(max(curve.values()) for curve in curves.values())
        low, high = int(low * 10) / 10, min(1.0, (int(high * 10) + 1) / 10)

        def at(
            target: int, value: float, most: int = max(targets), low: float = low, high: float = high
        ) -> tuple[float, float]:
            across = left + (width - left - 16) * target / most
            return across, top + (height - top - 36) * (high - value) / (high - low)

        parts = [f'<text x="{left}" y="18" class="t">{name}</text>']
        for tick in range(round(low * 10), round(high * 10) + 1, 1 if high - low <= 0.5 else 2):
            _, down = at(0, tick / 10)
            parts.append(f'<path d="M{left} {down:.1f}H{width - 16}" class="g"/>')
            parts.append(f'<text x="{left - 6}" y="{down + 4:.1f}" class="y">{tick * 10}%</text>')
        for target in targets[::ticks]:
            across, _ = at(target, low)
            parts.append(f'<text x="{across:.1f}" y="{height - 18}" class="x">{target}%</text>')
        middle = (left + width) / 2
        parts.append(f'<text x="{middle}" y="{height - 2}" class="x">{across_label}</text>')
        for curve, colour in colours.items():
            if curve not in curves:
                continue
            points = [at(target, value) for target, value in sorted(curves[curve].items())]
            line = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
            parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>' for a, b in points]
            for target, half in ((spread or {}).get(name, {}).get(curve, {})).items():
                a, b = at(target, curves[curve][target])
                up = at(target, curves[curve][target] + half)[1]
                parts.append(f'<path d="M{a:.1f} {up:.1f}V{2 * b - up:.1f}" stroke="{colour}"/>')
        drawn.append(
            f'<g transform="translate({index % 2 * width},{index // 2 * height})">{"".join(parts)}</g>'
        )
    down_to = height * -(-len(found) // 2)
    wide = width * min(2, len(found))
    row = max(1, (wide - 48) // 138)
    keys = "".join(
        f'<g transform="translate({48 + 138 * (index % row)},{down_to + 16 + 18 * (index // row)})">'
        f'<rect width="12" height="4" y="-6" fill="{colour}"/><text x="17" class="k">{name}</text></g>'
        for index, (name, colour) in enumerate(colours.items())
    )
    style = (
        "text{font:12px system-ui,sans-serif;fill:#5b6670}.t{font-weight:600;font-size:11px}.y{text-anchor:end}.x{text-anchor:middle}"
        ".g{stroke:#8884;stroke-width:1}"
    )
    size = f"{wide} {down_to + 10 + 18 * -(-len(colours) // row)}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" role="img" '
        f'aria-label="Accuracy over {across_label}"><style>{style}</style>{"".join(drawn)}{keys}</svg>\n'
    )
