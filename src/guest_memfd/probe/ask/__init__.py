"""How a question is put to a kernel: system calls, children that may die of it, a guest, what there is here."""
