"""The report's page: skeleton, style and script, and the few building blocks that its sections share.

Everything is inside the one file: no font, script, style or picture is fetched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from altsight.study.figures import Figure
from altsight.study.style import CSS, SCRIPT


@dataclass(frozen=True)
class Section:
    """One section of the page; `body` is HTML."""

    name: str
    title: str
    body: str


def page(title: str, subtitle: str, sections: Sequence[Section], foot: str) -> str:
    """Return the whole document."""
    from plotly.offline import get_plotlyjs

    links = "".join(f'<li><a href="#{s.name}">{escape(s.title)}</a></li>' for s in sections)
    body = "\n".join(
        f'<section id="{s.name}" aria-labelledby="{s.name}-title">\n<h2 id="{s.name}-title">{escape(s.title)}</h2>\n'
        f"{s.body}\n</section>"
        for s in sections
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{CSS}</style>
</head>
<body>
<div class="sheet">
<nav class="toc" aria-label="Contents"><ol>{links}</ol></nav>
<header><h1>{escape(title)}</h1><p class="sub">{escape(subtitle)}</p></header>
<main>
{body}
</main>
<footer>{escape(foot)}</footer>
</div>
<script>{get_plotlyjs()}</script>
<script>{SCRIPT}</script>
</body>
</html>
"""


def wide(inner: str, label: str) -> str:
    """Return a block that scrolls sideways on its own where the page is too narrow; reachable by keyboard."""
    return f'<div class="wide" tabindex="0" role="region" aria-label="{escape(label)}">{inner}</div>'


def bullets(sentences: Sequence[str]) -> str:
    """Return plain sentences as a list ("" for none)."""
    return f"<ul>{''.join(f'<li>{escape(s)}</li>' for s in sentences)}</ul>" if sentences else ""


def facts(rows: Sequence[tuple[str, str]], label: str) -> str:
    """Return a two-column table of names and plain values."""
    body = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in rows)
    return wide(f'<table class="text"><tbody>{body}</tbody></table>', label)


def plot(figure: Figure, name: str) -> str:
    """Return the place where the page's script draws `figure`, with its data."""
    return (
        f'<div class="plot" role="img" aria-label="{escape(figure.words)}" data-figure="{name}"></div>'
        f'<script type="application/json" id="{name}">{figure.json()}</script>'
    )


def axis_choice() -> str:
    """Return the switch between samples and FLOPs on the horizontal axes."""
    return (
        '<fieldset class="axis"><legend>Horizontal axis</legend>'
        '<label><input type="radio" name="axis" value="samples" checked> samples seen</label>'
        '<label><input type="radio" name="axis" value="flops"> training FLOPs</label></fieldset>'
    )
