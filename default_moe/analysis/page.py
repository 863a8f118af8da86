"""The report as one HTML file that needs no network: text, pictures and their captions."""

import base64
import html
from collections.abc import Mapping, Sequence

from default_moe.analysis.pictures import Part

_STYLE = """
body { font: 16px/1.45 system-ui, sans-serif; color: #222; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(26rem, 1fr)); gap: 1.5rem; }
figure { margin: 0; }
figure img { max-width: 100%; }
figcaption, .caption { font-size: 0.85rem; color: #444; max-width: 34rem; }
pre, code { font-size: 0.85rem; background: #f4f4f4; }
pre { padding: 0.6rem; white-space: pre-wrap; }
nav a { margin-right: 1rem; }
table { border-collapse: collapse; } td, th { text-align: left; padding: 0.1rem 0.8rem 0.1rem 0; vertical-align: top; }
.tokens { font: 0.9rem/1.7 monospace; overflow-wrap: anywhere; }
.tokens span { white-space: pre-wrap; }
.numbered .tokens span::after { content: attr(data-e); font-size: 0.6rem; vertical-align: super; color: #444; }
"""


def page(title: str, about: Sequence[str], parts: Sequence[Part], drawn: Mapping[str, bytes], command: str) -> str:
    """Return the HTML.

    about: lines on what was analysed.  drawn: SVGs or PNGs by the pictures' names, of those that could be drawn.
    command: that makes the same report.
    """
    body = []
    for number, part in enumerate(parts):
        body.append(f'<h2 id="part{number}">{html.escape(part.title)}</h2>')
        if part.lines:
            shown = part.lines[:12] + ([f"... {len(part.lines) - 12} more"] if len(part.lines) > 12 else [])
            body.append(f"<pre>{html.escape(chr(10).join(shown))}</pre>")
        body.append('<div class="pictures">')
        for picture in part.pictures:
            if picture.name in drawn:
                image = drawn[picture.name]
                kind = "png" if image.startswith(b"\x89PNG") else "svg+xml"
                data = base64.b64encode(image).decode()
                alt, caption = html.escape(picture.title), html.escape(picture.caption)
                body.append(
                    f'<figure><h3>{alt}</h3><img alt="{alt}" src="data:image/{kind};base64,{data}"><figcaption>'
                    f"{caption} Numbers: <code>{picture.name}.json</code></figcaption></figure>"
                )
        body.append(f"</div>{part.html}")
    contents = " ".join(f'<a href="#part{i}">{html.escape(part.title)}</a>' for i, part in enumerate(parts))
    lines = "".join(f"<p>{html.escape(line)}</p>" for line in about)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<link rel="icon" href="data:,"><style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1>{lines}'
        f"<nav>{contents}</nav>{''.join(body)}<hr><p class=caption>Made by <code>{html.escape(command)}</code></p>"
        "</body></html>\n"
    )
