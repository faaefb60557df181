"""``python -m docsite FOLDER``: put together in FOLDER what MkDocs (mkdocs.yml) makes the site of."""

from __future__ import annotations

import sys
from pathlib import Path

from docsite.examples import write
from docsite.gather import gather

ROOT = Path(__file__).resolve().parents[2]


def main(arguments: list[str]) -> int:
    """Gather the documents, and make the example pages; returns 0."""
    (folder,) = map(Path, arguments)
    gather(ROOT, folder)
    write(folder / "examples")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
