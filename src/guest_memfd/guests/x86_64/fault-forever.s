# An exception without a handler: there is no memory where the processor looks for a descriptor, so the fault faults, and so
# does that. The processor calls it a triple fault.

_start:
    call    enter
    ud2
    jmp     power_off
