"""One HTML file that says what was made, how it scored and how it looks.

It holds everything it shows (styles and pictures are inline), loads nothing from anywhere, runs no
script, and reads well on a phone and in the dark.
"""

from __future__ import annotations

from pathlib import Path

from featstore.pictures.files import publish
from featstore.pictures.report_content import Report
from featstore.pictures.report_html import body, text
from featstore.pictures.report_style import STYLE


def write_report(path: Path, report: Report) -> Path:
    """Write the page to ``path``; missing folders are made, an older page is replaced at once.

    Raises:
        BadRequestError: if pictures have the wrong shape.
        StorageError: if the file cannot be written.
    """
    return publish(path, render_report(report).encode())


def render_report(report: Report) -> str:
    """The page as HTML text."""
    parts = [f"<h1>{text(report.title)}</h1>", f'<p class="lead">{text(report.lead)}</p>']
    for section in report.sections:
        note = f'<p class="note">{text(section.note)}</p>' if section.note else ""
        parts.append(f"<section><h2>{text(section.title)}</h2>{body(section)}{note}</section>")
    made = "".join(f"<dt>{text(key)}</dt><dd>{text(value)}</dd>" for key, value in report.made.items())
    parts.append(f'<section><h2>How it was made</h2><dl class="made">{made}</dl></section>')
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f"<title>{text(report.title)}</title><style>{STYLE}</style></head>\n"
        f"<body><main>{chr(10).join(parts)}</main></body></html>\n"
    )
