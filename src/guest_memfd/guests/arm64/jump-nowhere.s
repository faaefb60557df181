// A wild jump, to an address where nobody ever had memory: an instruction abort at stage 2. There is nothing to demand-page,
// so the host has to end the guest or deliver the abort.

_start:
    bl      enter
    mov     x0, #0x7000000000
    br      x0
