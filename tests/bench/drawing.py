"""A curve as an SVG, which every browser shows: too little for a library."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

_WIDTH, _HEIGHT, _EDGE = 640, 360, 60


def curve(title: str, points: Mapping[int, float], floor: tuple[str, float], *, x: str, y: str) -> str:
    """Points joined by lines, the x axis by powers of two, above a dashed line at `floor` (its name, its height)."""
    most = 1.2 * max(*points.values(), floor[1])
    steps = max(len(points) - 1, 1)
    across = {value: _EDGE + (_WIDTH - 2 * _EDGE) * number / steps for number, value in enumerate(sorted(points))}

    def up(value: float) -> float:
        return _HEIGHT - _EDGE - (_HEIGHT - 2 * _EDGE) * value / most

    def text(at: float, height: float, words: str, anchor: str = "middle") -> str:
        return f'<text x="{at:.1f}" y="{height:.1f}" text-anchor="{anchor}">{escape(words)}</text>'

    line = " ".join(f"{across[value]:.1f},{up(points[value]):.1f}" for value in sorted(points))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif">',
        '<rect width="100%" height="100%" fill="white"/>',
        text(_WIDTH / 2, _EDGE / 2, title),
        text(_WIDTH / 2, _HEIGHT - 10, x),
        text(10, _EDGE - 15, y, "start"),
        f'<path d="M{_EDGE} {_EDGE} V{_HEIGHT - _EDGE} H{_WIDTH - _EDGE}" fill="none" stroke="black"/>',
        f'<path d="M{_EDGE} {up(floor[1]):.1f} H{_WIDTH - _EDGE}" stroke="gray" stroke-dasharray="6"/>',
        text(_WIDTH - _EDGE, up(floor[1]) + 18, f"{floor[0]}: {floor[1]:.2f}", "end"),
        f'<polyline points="{line}" fill="none" stroke="#2a6" stroke-width="2"/>',
    ]
    for value, at in across.items():
        parts += [
            f'<circle cx="{at:.1f}" cy="{up(points[value]):.1f}" r="4" fill="#2a6"/>',
            text(at, up(points[value]) - 10, f"{points[value]:.2f}"),
            text(at, _HEIGHT - _EDGE + 20, str(value)),
        ]
    return "\n".join([*parts, text(_EDGE - 8, up(0), "0", "end"), "</svg>"]) + "\n"
