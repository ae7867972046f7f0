"""The gallery as HTML: reconstructions, captions and retrieval examples."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from altsight.study.gallery import Gallery, ImageQuery, TextQuery
from altsight.study.page import wide


def reconstructions(gallery: Gallery) -> str:
    """Return held-out images, what each method saw of them, and what it made of it: a picture, a caption, or both."""
    if not (gallery.rebuilt or gallery.captions):
        return "<p>None of the methods reconstructs images or writes captions.</p>"
    rows = [_picture_row("held-out image", [image.picture for image in gallery.images], "held-out image")]
    truth = [image.captions[0] if image.captions else "" for image in gallery.images]
    rows.append(_text_row("true caption", truth))
    for name in dict.fromkeys([*gallery.rebuilt, *gallery.captions]):
        if rebuilt := gallery.rebuilt.get(name):
            rows.append(_picture_row(f"{name} sees", [r.masked for r in rebuilt], f"what {name} sees of image"))
            made = [r.reconstruction for r in rebuilt]
            rows.append(_picture_row(f"{name} rebuilds", made, f"what {name} rebuilds of image"))
        if name in gallery.captions:
            rows.append(_text_row(f"{name} says", gallery.captions[name]))
    words = (
        f"Test images of {escape(gallery.task)} at even distances, not chosen by hand. Grey patches are hidden from "
        "the method, and its captions are written from the visible patches alone; a method without them sees the whole "
        "image. Where a patch is predicted without its mean and contrast, these two come from the image."
    )
    table = f'<table class="pictures"><tbody>{"".join(rows)}</tbody></table>'
    return f"<p>{words}</p>{wide(table, 'Reconstructions')}"


def _picture_row(label: str, pictures: Sequence[str], alt: str) -> str:
    cells = "".join(f'<td><img src="{p}" alt="{escape(alt)} {i}"></td>' for i, p in enumerate(pictures, start=1))
    return f'<tr><th scope="row">{escape(label)}</th>{cells}</tr>'


def _text_row(label: str, texts: Sequence[str]) -> str:
    cells = "".join(f"<td>{escape(text)}</td>" for text in texts)
    return f'<tr><th scope="row">{escape(label)}</th>{cells}</tr>'


def retrieval(gallery: Gallery) -> str:
    """Return text-to-image and image-to-text examples of every dual encoder."""
    if not gallery.by_text:
        return "<p>None of the methods matches images with texts, or the first task has no captions.</p>"
    parts = [
        f"<p>Queries at even distances through the test split of {escape(gallery.task)}; every test image and caption "
        "is a candidate. Right answers have a green frame or are set in bold.</p>"
    ]
    for name, queries in gallery.by_text.items():
        parts.append(f"<h3>{escape(name)}: text to images</h3>" + "".join(map(_text_query, queries)))
        images = "".join(_image_query(query) for query in gallery.by_image[name])
        parts.append(f"<h3>{escape(name)}: image to captions</h3>{images}")
    return "".join(parts)


def _text_query(query: TextQuery) -> str:
    items = "".join(
        f'<li class="{"right" if right else "wrong"}"><img src="{picture}" alt="{escape(caption)}">'
        f"{'<b>right:</b> ' if right else ''}{escape(caption)}</li>"
        for picture, caption, right in query.found
    )
    text = f"<p>&ldquo;{escape(query.text)}&rdquo;</p>"
    return f'<div class="query">{text}<ol class="found" tabindex="0">{items}</ol></div>'


def _image_query(query: ImageQuery) -> str:
    items = "".join(
        f'<li class="right"><b>{escape(text)}</b> (right)</li>' if right else f"<li>{escape(text)}</li>"
        for text, right in query.found
    )
    alt = escape(query.captions[0])
    truth = f'<p class="small muted">True caption: {escape(query.captions[0])}</p>'
    return f'<div class="query pair"><img src="{query.picture}" alt="{alt}"><div>{truth}<ol>{items}</ol></div></div>'
