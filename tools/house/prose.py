"""Words: how much docstrings and comments say."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator

from house.graph import SOURCE, modules

HARDEST = (
    "explore/engine/tables.py", "explore/engine/footprint.py", "core/convert.py", "core/direct_map.py",
    "machine/hw/arm64/tlb.py", "machine/hw/arm64/mmu.py", "machine/hw/arm64/tables.py", "machine/linux/mem_abort.py",
    "machine/el2/pkvm/transitions.py", "machine/el2/gunyah/stage2.py",
)
"""Files that no one understands by reading the code alone."""

FEW = 3


def docstrings(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """Docstrings of the module, its classes and its functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield node, text


def words_per_docstring() -> float:
    """The mean of the ten hardest files."""
    said = [len(text.split()) for path in HARDEST
            for _, text in docstrings(ast.parse((SOURCE / path).read_text(encoding="utf-8")))]
    return sum(said) / len(said)


def short_docstrings() -> int:
    """Docstrings of FEW words or fewer."""
    return sum(len(text.split()) <= FEW for path in modules().values()
               for _, text in docstrings(ast.parse(path.read_text(encoding="utf-8"))))


def comment_lines() -> float:
    """Lines that have a comment, of all that are not empty."""
    comments = lines = 0
    for path in modules().values():
        text = path.read_text(encoding="utf-8")
        lines += sum(bool(line.strip()) for line in text.splitlines())
        comments += sum(token.type == tokenize.COMMENT for token in tokenize.generate_tokens(io.StringIO(text).readline))
    return comments / lines
