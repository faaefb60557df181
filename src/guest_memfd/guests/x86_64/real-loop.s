# A real-mode guest that never gives the CPU back: only the host's timer ends it.

.code16
_start:
    jmp     _start
