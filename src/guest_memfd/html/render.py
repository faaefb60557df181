"""A page: one template filled in, with style and script inside, so that it works from disk and asks nobody for anything.

Every text is escaped by the template engine, and the page's own policy allows no script but ours, by its hash: where a name
holds markup, the browser shows it. Sizes: style and script together are some 15 kB.
"""

from __future__ import annotations

from base64 import b64encode
from functools import cache
from hashlib import sha256
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from guest_memfd.explore.trace import version


def render(template: str, **context: Any) -> str:
    """The page *template* (a file of templates/) with *context*, as text of a complete HTML file."""
    style, script = _asset("page.css"), _asset("page.js")
    policy = f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'"
    # They are ours, and hold no end tag; everything else is text.
    return _environment().get_template(template).render(
        style=Markup(style), script=Markup(script), policy=policy, version=version(), **context)


@cache
def _environment() -> Environment:
    # StrictUndefined: a name that is misspelt in a template is an error, and not a hole in the page.
    return Environment(loader=PackageLoader("guest_memfd.html"), autoescape=True, undefined=StrictUndefined,
                       trim_blocks=True, lstrip_blocks=True)


@cache
def _asset(name: str) -> str:
    return (resources.files("guest_memfd.html") / "assets" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{b64encode(sha256(text.encode()).digest()).decode()}"
