"""SVG elements as text, and how wide a label may get."""

from __future__ import annotations

import unicodedata
from xml.sax.saxutils import escape, quoteattr

__all__ = ["element", "escaped", "label", "shorten", "text_width"]

# In ems, after DejaVu Sans, which is wider than Arial and Helvetica.
_THIN, _NARROW, _WIDE = (
    frozenset(" ',.:;Iijl|"),
    frozenset("!()-/[]frt"),
    frozenset("%@MWmw=+<>…\N{MULTIPLICATION SIGN}"),
)
_BOLD = 1.13


def element(tag: str, *children: str, **attributes: str | float) -> str:
    """An element; `children` are markup. In attributes' names an underscore stands for a hyphen."""
    values = {name.rstrip("_").replace("_", "-"): _number(value) for name, value in attributes.items()}
    opening = " ".join([tag, *(f"{name}={quoteattr(value)}" for name, value in values.items())])
    return f"<{opening}>{''.join(children)}</{tag}>" if children else f"<{opening}/>"


def label(text: str, x: float, y: float, size: float, *, bold: bool = False, end: bool = False) -> str:
    """A text whose baseline begins, or with `end` ends, at a point."""
    attributes: dict[str, str | float] = {"x": x, "y": y, "font_size": size}
    if bold:
        attributes["font_weight"] = "bold"
    if end:
        attributes["text_anchor"] = "end"
    return element("text", escaped(text), **attributes)


def escaped(text: str) -> str:
    """`text` as markup, without the characters that XML 1.0 has no place for."""
    return escape("".join(filter(_allowed, text)))


def text_width(text: str, size: float, bold: bool = False) -> float:
    """About as much as the wide ones of the usual sans-serif fonts take, in the unit of `size`."""
    return sum(map(_character_width, text)) * size * (_BOLD if bold else 1)


def shorten(text: str, width: float, size: float, bold: bool = False) -> str:
    """`text`, its middle replaced by an ellipsis where it would be wider than `width`."""
    if text_width(text, size, bold) <= width:
        return text
    for kept in range(len(text) - 1, 0, -1):
        shorter = text[: (kept + 1) // 2] + "…" + text[len(text) - kept // 2 :]
        if text_width(shorter, size, bold) <= width:
            return shorter
    return "…"


def _character_width(character: str) -> float:
    if not character.isascii() and character not in _WIDE:
        return 0.0 if unicodedata.combining(character) else 1.1
    for characters, width in ((_THIN, 0.34), (_NARROW, 0.42), (_WIDE, 1.0)):
        if character in characters:
            return width
    return 0.79 if character.isupper() else 0.64


def _allowed(character: str) -> bool:
    """Neither control characters nor halves of surrogate pairs are."""
    return unicodedata.category(character) not in ("Cc", "Cs") and character not in "\ufffe\uffff"


def _number(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")
