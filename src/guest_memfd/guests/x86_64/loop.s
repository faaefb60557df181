# A guest that never gives the CPU back: only the host's timer ends it.

_start:
    jmp     _start
