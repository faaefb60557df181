"""The memo of one thread: where walks have ended, for as long as rows and trees are as they were (loops_trees.py)."""

from __future__ import annotations

import numpy as np

from guest_memfd.explore.engine.compiled.encoding import MEMO_HEAD
from guest_memfd.explore.engine.compiled.rows import Rows

FEW = 1 << 12
"""Rows below which walks are not worth remembering."""


class Memo:
    """*size* entries for *parties* parties and the laws; none as long as there are few rows."""

    def __init__(self, size: int, parties: int) -> None:
        self.size, self.parties = size, parties
        self.looks = np.zeros((parties + 1, 0, 0), np.uint64)
        self.entries = np.zeros((0, 0), np.uint64)
        self._made_for: tuple[int, ...] = ()

    def keep_up(self, rows: Rows) -> None:
        """Forget what was remembered of other trees, or of rows in which fewer parts had room."""
        if not self.size or len(rows) < FEW:
            return
        words, places = rows.rows.shape[1], rows.flat.trees.root.shape[1]
        now = len(rows.placed), len(rows.flat.of_part), places, words
        if now != self._made_for:
            self._made_for = now
            self.looks = np.zeros((self.parties + 1, places, words), np.uint64)
            self.entries = np.zeros((self.size, MEMO_HEAD + words), np.uint64)
