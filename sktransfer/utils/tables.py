"""Tables, lists and images for reports, as text and as HTML."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence


class Html(str):
    """HTML; any other text is escaped."""


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int]) -> str:
    """Format a table; the columns whose numbers are in `left` are left-aligned.

    Examples
    --------
    >>> print(text_table(["name", "size"], [["a", "10"], ["bcd", "5"]], left=[0]))
    name  size
    a       10
    bcd      5
    """
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def counted(count: int, noun: str) -> str:
    """Return a number and a noun.

    Examples
    --------
    >>> counted(1, "image"), counted(1200, "class")
    ('1 image', '1,200 classes')
    """
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{count:,} {noun if count == 1 else plural}"


def format_bytes(count: float) -> str:
    """Format a number of bytes with a unit of 1e3, 1e6, ... bytes.

    Examples
    --------
    >>> format_bytes(0), format_bytes(45_783_040), format_bytes(2_400_000_000)
    ('0 bytes', '46 MB', '2.4 GB')
    """
    if count < 1e3:
        return f"{count:.0f} bytes"
    power = next(power for power in range(1, 5) if count < 999.5 * 1e3**power or power == 4)
    return f"{_two_digits(count / 1e3**power)} {'kMGT'[power - 1]}B"


def format_seconds(seconds: float) -> str:
    """Format a duration in seconds, minutes or hours.

    Examples
    --------
    >>> format_seconds(0.25), format_seconds(24.3), format_seconds(239.9), format_seconds(9000)
    ('0.2 s', '24 s', '4 min', '2.5 h')
    """
    for unit, size in (("s", 1), ("min", 60)):
        if seconds < 99.5 * size:
            return f"{_two_digits(seconds / size)} {unit}"
    return f"{_two_digits(seconds / 3600)} h"


def _two_digits(number: float) -> str:
    """Format a number of at least 0 with two digits, or as an integer, without a final zero."""
    return f"{number:,.0f}" if number >= 9.95 else f"{number:.1f}".removesuffix(".0")


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int]) -> str:
    """Build the table of `text_table` in HTML; cells may be `Html`."""

    def table_row(tag: str, cells: Sequence[str]) -> str:
        sides = ["left" if column in left else "right" for column in range(len(cells))]
        styled = "".join(
            f'<{tag} style="text-align: {side}; padding: 0.1em 0.8em">{_cell_html(cell)}</{tag}>'
            for cell, side in zip(cells, sides, strict=True)
        )
        return f"<tr>{styled}</tr>"

    body = "".join(table_row("td", cells) for cells in rows)
    return f"<table><thead>{table_row('th', header)}</thead><tbody>{body}</tbody></table>"


def html_list(items: Sequence[str]) -> str:
    """Build a list in HTML."""
    return "<ul>" + "".join(f"<li>{_escape(item)}</li>" for item in items) + "</ul>"


def html_image(jpeg: bytes, caption: str) -> Html:
    """Build an image element that contains the JPEG.

    Its size is limited, and the border shows the outline of a white image on a white page.
    """
    data = base64.b64encode(jpeg)
    caption = _escape(caption)
    return Html(
        f'<img src="data:image/jpeg;base64,{data.decode()}" alt="{caption}" title="{caption}" '
        'style="max-height: 6em; max-width: 12em; border: 1px solid #aaa; margin: 0.1em">'
    )


def _cell_html(cell: str) -> str:
    # Long paths may break after a slash, so that a table fits its page.
    return cell if isinstance(cell, Html) else _escape(cell).replace("/", "/<wbr>")


def _escape(text: str) -> str:
    """Escape text for HTML; file names need not be UTF-8."""
    return html.escape(text.encode(errors="replace").decode(), quote=True)
