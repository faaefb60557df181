# A wild jump, to an address where nobody ever had memory: it is mapped, and no slot is behind it. There is nothing to fetch,
# so KVM has to give up.

_start:
    call    enter
    mov     eax, 0x70000000
    jmp     rax
