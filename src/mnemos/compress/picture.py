"""A comparison as a picture: how large the divergence is for how many tokens, as SVG."""

from __future__ import annotations

import math
from html import escape

import numpy as np

from mnemos.compress.evaluate import Comparison

_WIDTH, _HEIGHT, _LEFT, _TOP, _PLOT_WIDTH, _PLOT_HEIGHT = 720, 420, 70, 60, 620, 300
_POINTS = 200
_LOWEST = 1e-6  # the axis is logarithmic and ends here
_INK, _FAINT, _CURVE, _MARK = "#1d1d1f", "#c9c9ce", "#2563eb", "#d97706"


def draw(comparison: Comparison, title: str) -> str:
    """An SVG document: every token's divergence in ascending order, on a logarithmic axis, with mean and percentile."""
    percents = np.linspace(0, 100, _POINTS + 1)
    values = np.maximum(np.percentile(comparison.divergences, percents), _LOWEST)
    low = math.floor(math.log10(values[0]))
    high = max(math.ceil(math.log10(values[-1])), low + 1)

    def x(percent: float) -> float:
        return _LEFT + _PLOT_WIDTH * percent / 100

    def y(value: float) -> float:
        share = (math.log10(max(value, _LOWEST)) - low) / (high - low)
        return _TOP + _PLOT_HEIGHT * (1 - share)

    parts = [_text(_LEFT, 28, title, 16), _text(_LEFT, 48, _summary(comparison), 12)]
    for exponent in range(low, high + 1):
        level = y(10.0**exponent)
        parts.append(_line(_LEFT, level, _LEFT + _PLOT_WIDTH, level, _FAINT))
        parts.append(_text(_LEFT - 8, level + 4, f"1e{exponent}" if exponent else "1", 11, "end"))
    for percent in range(0, 101, 10):
        parts.append(_text(x(percent), _TOP + _PLOT_HEIGHT + 18, f"{percent}%", 11, "middle"))
    curve = " ".join(f"{x(percent):.1f},{y(value):.1f}" for percent, value in zip(percents, values, strict=True))
    parts.append(f'<polyline points="{curve}" fill="none" stroke="{_CURVE}" stroke-width="2"/>')
    for name, value in (("mean", comparison.divergence), ("99%", comparison.percentile(99))):
        parts.append(_line(_LEFT, y(value), _LEFT + _PLOT_WIDTH, y(value), _MARK, dashed=True))
        parts.append(_text(_LEFT + 6, y(value) - 5, f"{name} {value:.3g}", 11))
    parts.append(_text(_LEFT, _HEIGHT - 16, "divergence (nats per token) of the tokens, in ascending order", 11))
    size = f'width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}"'
    background = f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>'
    body = "\n".join([background, *parts])
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">\n{body}\n</svg>\n'


def _summary(comparison: Comparison) -> str:
    return (
        f"perplexity {comparison.perplexity:.2f} against {comparison.against_perplexity:.2f}, same most probable token "
        f"for {100 * comparison.agreement:.1f}% of {len(comparison.divergences)} tokens"
    )


def _text(x: float, y: float, text: str, size: int, anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{_INK}">{escape(text)}</text>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, color: str, dashed: bool = False) -> str:
    dashes = ' stroke-dasharray="5 4"' if dashed else ""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}"{dashes}/>'
