"""What pages are made of: their style, escaped text, tables. A page is one file that needs nothing but a browser.

All text on a page comes from data and is escaped; a policy in its head forbids it the network and strange scripts.
"""

from __future__ import annotations

import base64
import hashlib
import html
import math
from collections.abc import Collection, Sequence

PAGE_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1d2024; --quiet: #596068; --rule: #d8dce0; --soft: #f4f5f7;
  --line: #1b5fae; --faint: #a9c2df; --good: #17722f; --bad: #b0271d; }
@media (prefers-color-scheme: dark) { :root { --paper: #15181b; --ink: #e4e7ea; --quiet: #a3abb3; --rule: #343a40;
  --soft: #1d2125; --line: #7db4f2; --faint: #3f5f82; --good: #62c67a; --bad: #ff8d84; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 66rem; padding: 2.5rem 1.5rem 5rem; background: var(--paper); color: var(--ink);
  font: 0.9375rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 1.1875rem; margin: 3.25rem 0 0.75rem; padding-top: 0.75rem; border-top: 1px solid var(--rule); }
h3 { font-size: 0.9375rem; margin: 0; overflow-wrap: anywhere; }
p { margin: 0.5rem 0; max-width: 46rem; }
a { color: var(--line); }
code { font: 0.875em ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; overflow-wrap: anywhere; }
nav a { margin-right: 1.1rem; white-space: nowrap; }
small, .quiet, figcaption { color: var(--quiet); font-size: 0.8125rem; }
.note { border-left: 3px solid var(--rule); padding-left: 0.75rem; color: var(--quiet); }
.sr { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: 1rem 1.5rem;
  margin: 1.5rem 0; }
.facts dt { color: var(--quiet); font-size: 0.8125rem; }
.facts dd { margin: 0; font-size: 1.125rem; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.scroll { position: relative; overflow-x: auto; margin: 0.75rem 0; }
.scroll:focus-visible { outline: 2px solid var(--line); outline-offset: 2px; }
table { border-collapse: separate; border-spacing: 0; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: baseline; padding: 0.375rem 1.375rem 0.375rem 0;
  border-bottom: 1px solid var(--rule); }
th:last-child, td:last-child { padding-right: 0; }
thead .n { white-space: normal; }
thead th { color: var(--quiet); font-weight: 500; font-size: 0.8125rem; vertical-align: bottom; }
tbody th { font-weight: 500; white-space: nowrap; } .below { display: block; }
tfoot th, tfoot td { border-bottom: 0; font-weight: 600; }
.n { text-align: right; white-space: nowrap; }
"""

POLICY = (
    "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
)
"""What a page may do: nothing but show what is in it."""

PICTURES = {9: "\t", 10: "\n"} | {i: chr(0x2400 + i) for i in range(32) if i not in (9, 10)} | {127: "\u2421"}
"""Control characters, which an untrained model likes to write, as the signs that stand for them."""


def esc(value: object) -> str:
    """Any text as HTML that shows it and does nothing else."""
    return html.escape(str(value).translate(PICTURES))


def note(text: str) -> str:
    """A line that says what is not so, set apart."""
    return f'<p class="note">{esc(text)}</p>'


def number(value: object) -> float | None:
    """A finite number as such; None for anything else that a file may hold in its place."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def percent(share: float | None) -> str:
    """A share of 1 in percent, or a dash."""
    return "\u2013" if share is None else f"{100 * share:.1f} %"


def duration(seconds: float) -> str:
    """A time as people say it."""
    if not 60 <= seconds < math.inf:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def table(
    label: str,
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    numbers: Collection[int] = (),
    foot: Sequence[str] | None = None,
) -> str:
    """A table in a box of its own that scrolls where the page is narrow.

    Args:
        label: What the table shows, for those who hear the page.
        head, rows, foot: Cells, already HTML; the first cell of a row names it.
        numbers: Columns that are set flush right.
    """

    def line(cells: Sequence[str], scope: str | None) -> str:
        made = []
        for i, cell in enumerate(cells):
            kind = ' class="n"' if i in numbers else ""
            heads = scope or ("row" if i == 0 else None)
            made.append(f'<th scope="{heads}"{kind}>{cell}</th>' if heads else f"<td{kind}>{cell}</td>")
        return f"<tr>{''.join(made)}</tr>"

    body = "".join(line(row, None) for row in rows)
    end = f"<tfoot>{line(foot, None)}</tfoot>" if foot else ""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{esc(label)}"><table>'
        f"<thead>{line(head, 'col')}</thead><tbody>{body}</tbody>{end}</table></div>"
    )


def document(title: str, body: str, *, style: str, script: str = "") -> str:
    """A whole page.

    Args:
        body: HTML.
        script: JavaScript of our own; no other is run, whatever the data say.
    """
    policy = POLICY
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy += f"; script-src 'sha256-{digest}'"
    end = f"<script>{script}</script>" if script else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{esc(title)}</title><style>{style}</style></head>\n"
        f"<body>{body}{end}</body></html>\n"
    )
