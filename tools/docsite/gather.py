"""The documents, copied as they lie, with every file that they link to; what a link names lies where the link says.

MkDocs wants all of it in one folder, and a file at the end of each link. So a link to a folder becomes one to the module
that tells what is in it.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

PAGES = ("*.md", "docs/*.md")
_LINK = re.compile(r"(\]\()([^)#:\s]+)(#[^)\s]*)?(\))")


def gather(root: Path, folder: Path) -> None:
    """Make *folder* anew, of the documents below *root*."""
    shutil.rmtree(folder, ignore_errors=True)
    for pattern in PAGES:
        for page in sorted(root.glob(pattern)):
            _copy(page, root, folder)


def _copy(page: Path, root: Path, folder: Path) -> None:
    def follow(link: re.Match[str]) -> str:
        there = (page.parent / link[2]).resolve()
        name = link[2]
        if there.is_dir():
            there, name = there / "__init__.py", f"{name.rstrip('/')}/__init__.py"
        if there.suffix != ".md":
            target = folder / there.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(there, target)
        return f"{link[1]}{name}{link[3] or ''}{link[4]}"

    target = folder / page.relative_to(root)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(_outside_of_code(page.read_text(encoding="utf-8"), follow), encoding="utf-8")


def _outside_of_code(text: str, follow: Callable[[re.Match[str]], str]) -> str:
    parts = re.split(r"(^```.*?^```$)", text, flags=re.M | re.S)
    return "".join(part if part.startswith("```") else _LINK.sub(follow, part) for part in parts)
