"""Two kinds of pictures as SVG: bars, and lines over a logarithmic axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from math import log2

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 720, 340, 60, 40, 50
COLORS = ("#d1495b", "#00798c", "#edae49", "#30638e", "#5b8e7d", "#8d6a9f")
TICKS = 5


def _page(title: str, body: Sequence[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="sans-serif" font-size="13"><rect width="{WIDTH}" height="{HEIGHT}" '
        f'fill="white"/><text x="{LEFT}" y="22" font-size="15">{escape(title)}</text>'
    )
    return "\n".join([head, *body, "</svg>\n"])


def _nice_top(value: float) -> float:
    """The next round number."""
    step = 10 ** len(str(int(value))) / 20 if value >= 1 else 0.1
    return (int(value / step) + 1) * step


def bars(title: str, values: Mapping[str, float]) -> str:
    """A bar for each name, with its value."""
    top, body = _nice_top(max(values.values())), []
    room = (WIDTH - LEFT - 20) / len(values)
    for i, (name, value) in enumerate(values.items()):
        height = (HEIGHT - TOP - BOTTOM) * value / top
        x, y = LEFT + i * room, HEIGHT - BOTTOM - height
        color = COLORS[i % len(COLORS)]
        middle = x + room * 0.4
        body += [
            f'<rect x="{x:.0f}" y="{y:.0f}" width="{room * 0.8:.0f}" height="{height:.0f}" '
            f'fill="{color}"/>',
            f'<text x="{middle:.0f}" y="{y - 5:.0f}" text-anchor="middle">{value:.2f}</text>',
            f'<text x="{middle:.0f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle" '
            f'font-size="12">{escape(name)}</text>',
        ]
    return _page(title, body)


def lines(title: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """A line for each name; x is logarithmic, y begins at 0."""
    places = sorted({x for points in series.values() for x, _ in points})
    top = _nice_top(max(y for points in series.values() for _, y in points))
    low, high = log2(places[0]), log2(places[-1])
    right = WIDTH - 190

    def at(x: float, y: float) -> tuple[float, float]:
        part = (log2(x) - low) / (high - low) if high > low else 0.5
        return LEFT + part * (right - LEFT), HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * y / top

    body = []
    for i in range(TICKS + 1):
        _, y = at(places[0], top * i / TICKS)
        body.append(f'<path d="M{LEFT} {y:.1f}H{right}" stroke="#ddd"/>')
        body.append(
            f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{top * i / TICKS:g}</text>'
        )
    for place in places:
        x, _ = at(place, 0)
        body.append(
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{place:g}</text>'
        )
    for i, (name, points) in enumerate(series.items()):
        color, spots = COLORS[i % len(COLORS)], [at(x, y) for x, y in points]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in spots)
        body.append(f'<path d="M{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        body += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{color}"/>' for x, y in spots]
        y = TOP + 18 * i + 10
        body.append(f'<circle cx="{right + 22}" cy="{y - 4}" r="5" fill="{color}"/>')
        body.append(f'<text x="{right + 34}" y="{y}">{escape(name)}</text>')
    return _page(title, body)
