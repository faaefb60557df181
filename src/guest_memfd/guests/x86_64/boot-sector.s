# A guest that never leaves real mode. It says hello, writes to a page in the middle of its memory, lets go of the page, for
# which the host punches a hole into the file, and touches it again.

.code16
_start:
    call    enter
    mov     si, offset line
    call    print
    mov     eax, es:[di + 24]                   # size of the memory
    cmp     eax, 0x100000
    jbe     reachable
    mov     eax, 0x100000
reachable:
    shr     eax, 1 + 12
    shl     eax, 12                             # the page
    mov     ebx, eax
    shr     eax, 4
    mov     fs, ax
    mov     dword ptr fs:[0], 0x52434553        # "SECR"

    mov     eax, ebx
    call    give_page
    test    eax, eax
    jnz     refused
    mov     si, offset given
    call    print
    mov     eax, fs:[0]
    mov     si, offset zeros
    test    eax, eax
    jz      say
    mov     si, offset still
    cmp     eax, 0x52434553
    je      say
    mov     si, offset other
say:
    call    print
    mov     dword ptr fs:[0], 1
    mov     si, offset used
    call    print
    jmp     power_off

refused:
    mov     si, offset refused_text
    call    print
    jmp     power_off

line:
    .asciz  "hello from real mode\n"
given:
    .asciz  "page given up\n"
zeros:
    .asciz  "page reads zeros\n"
still:
    .asciz  "page still holds the secret\n"
other:
    .asciz  "page holds something else\n"
used:
    .asciz  "page in use again\n"
refused_text:
    .asciz  "the host refused to take the page\n"
