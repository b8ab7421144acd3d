"""Figures as a picture: a bar for each, in panels by group, with the targets as marks (SVG)."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from mnemos.bench.comprehensive import Figure

_WIDTH, _LABELS, _VALUES, _ROW, _PANEL = 760, 190, 150, 26, 46
_INK, _FAINT, _BAR, _MISSED = "#1d1d1f", "#c9c9ce", "#2563eb", "#d97706"
_BARS = _WIDTH - _LABELS - _VALUES


def draw(figures: Sequence[Figure], title: str) -> str:
    """An SVG document. Bars of a panel have a common scale if they have the same unit; a bar that misses its target is
    of another colour."""
    groups = list(dict.fromkeys(figure.group for figure in figures))
    parts = [_text(16, 28, title, 16)]
    top = 48
    for group in groups:
        members = [figure for figure in figures if figure.group == group]
        parts.append(_text(16, top + 18, group, 13, weight="bold"))
        top += 28
        for figure in members:
            same = [one for one in members if one.result.unit == figure.result.unit]
            most = max(1e-12, *(max(one.result.value, one.target or 0.0) for one in same), 0.0)
            if figure.result.unit.startswith("%"):
                most = max(most, 100.0)
            parts += _bar(figure, most, top)
            top += _ROW
        top += _PANEL - 28
    size = f'width="{_WIDTH}" height="{top}" viewBox="0 0 {_WIDTH} {top}"'
    body = "\n".join([f'<rect width="{_WIDTH}" height="{top}" fill="white"/>', *parts])
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">\n{body}\n</svg>\n'


def _bar(figure: Figure, most: float, top: int) -> list[str]:
    result, middle = figure.result, top + 12
    color = _MISSED if figure.met is False else _BAR
    width = max(1.0, _BARS * result.value / most)
    parts = [
        _text(_LABELS - 10, middle + 4, result.metric, 12, anchor="end"),
        f'<rect x="{_LABELS}" y="{top + 3}" width="{width:.1f}" height="18" fill="{color}"/>',
        _text(_LABELS + _BARS + 10, middle + 4, f"{result.value:.4g} {result.unit}", 12),
    ]
    if figure.target is not None:
        x = _LABELS + _BARS * figure.target / most
        parts.append(
            f'<line x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{top + 24}" stroke="{_INK}" stroke-dasharray="4 3">'
            f"<title>{escape(figure.verdict)}</title></line>"
        )
    return parts


def _text(x: float, y: float, text: str, size: int, anchor: str = "start", weight: str = "normal") -> str:
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" font-weight="{weight}" fill="{_INK}">'
        f"{escape(text)}</text>"
    )
