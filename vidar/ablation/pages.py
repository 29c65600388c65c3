"""A report as a list of plain blocks, written as one self-contained HTML file and as Markdown.

No script and no file beside it is needed to read the HTML, and it prints. This module must not know what is reported.
"""

import base64
import html
import mimetypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vidar.evaluation.writing import replaced

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 72em; padding: 0 1em; color: #111; }
h2 { margin: 1.8em 0 .4em; border-bottom: 1px solid #bbb; } p { max-width: 52em; }
table { border-collapse: collapse; font-size: 12.5px; margin: .6em 0; }
th, td { border: 1px solid #ccc; padding: 3px 7px; text-align: left; vertical-align: top; }
th { background: #f2f2f2; } td { font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; } img { max-width: 100%; } .pixels { image-rendering: pixelated; }
figure { margin: 1em 0; break-inside: avoid; } figcaption { font-size: 13px; color: #444; }
pre { font-size: 11px; background: #f7f7f7; padding: .7em; overflow-x: auto; white-space: pre-wrap; }
@media print { body { margin: 0; max-width: none; } table { font-size: 8.5px; } tr, img { break-inside: avoid; } }
"""


@dataclass(frozen=True)
class Heading:
    """A section begins.

    Attributes:
        text: Its title.
    """

    text: str


@dataclass(frozen=True)
class Paragraph:
    """Plain words.

    Attributes:
        text: The words.
    """

    text: str


@dataclass(frozen=True)
class Table:
    """Rows of text.

    Attributes:
        header: Names of the columns.
        rows: Cells of each row.
        caption: What it shows.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True)
class Picture:
    """An image or animation beside the report; the HTML holds a copy of it.

    Attributes:
        path: Its file.
        caption: What it shows.
        width: Width in CSS pixels at which single pixels are shown; None for the image's own.
    """

    path: Path
    caption: str
    width: int | None = None


@dataclass(frozen=True)
class Details:
    """Text that few will open; the Markdown leaves it out.

    Attributes:
        summary: What it is.
        text: The text, as it is.
    """

    summary: str
    text: str


Block = Heading | Paragraph | Table | Picture | Details


def write_pages(title: str, blocks: Sequence[Block], directory: Path) -> tuple[Path, Path]:
    """Writes `report.html` and `report.md`.

    Args:
        title: Title of both.
        blocks: What they say, in order.
        directory: Where to, beside the pictures.

    Returns:
        The two files.
    """
    body = "\n".join(_html(block) for block in blocks)
    page = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f"<style>{_STYLE}</style></head>\n<body><h1>{html.escape(title)}</h1>\n{body}\n</body></html>\n"
    )
    texts = "\n\n".join(text for text in (_markdown(block) for block in blocks) if text)
    written = directory / "report.html", directory / "report.md"
    for path, content in zip(written, (page, f"# {title}\n\n{texts}\n"), strict=True):
        with replaced(path) as unfinished:
            unfinished.write_text(content)
    return written


def _html(block: Block) -> str:
    match block:
        case Heading(text):
            return f"<h2>{html.escape(text)}</h2>"
        case Paragraph(text):
            return f"<p>{html.escape(text)}</p>"
        case Table(header, rows, caption):
            head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
            body = "\n".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
            said = f"<p>{html.escape(caption)}</p>" if caption else ""
            return (
                f'{said}<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'
            )
        case Picture(path, caption, width):
            kind = mimetypes.guess_type(path.name)[0] or "image/webp"
            data = base64.b64encode(path.read_bytes()).decode()
            size = "" if width is None else f' class="pixels" style="width: {width}px"'
            image = f'<img{size} alt="{html.escape(caption)}" src="data:{kind};base64,{data}">'
            return f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>"
        case Details(summary, text):
            return f"<details><summary>{html.escape(summary)}</summary><pre>{html.escape(text)}</pre></details>"


def _markdown(block: Block) -> str:
    match block:
        case Heading(text):
            return f"## {text}"
        case Paragraph(text):
            return text
        case Table(header, rows, caption):
            lines = [header, ["---"] * len(header), *rows]
            table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
            return f"{caption}\n\n{table}" if caption else table
        case Picture(path, caption, _):
            return f"![{caption}]({path.name})"
        case Details():
            return ""
