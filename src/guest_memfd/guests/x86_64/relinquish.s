# A page goes back to the host with the guest's consent, and is touched again.
# The guest writes its secret to the page in the middle of its private memory, then lets go of the page, for which the host
# punches a hole into the file. Afterwards it reads the page: the secret (nobody took it), zeros (it was replaced), or
# something else (the host wrote).

_start:
    call    enter
    mov     rbp, r13
    shr     rbp, 1
    add     rbp, r12
    and     rbp, -PAGE                          # the page
    mov     rdi, rbp
    lea     rsi, [rip + secret]
    call    copy
    mov     r8, [rbp]                           # the secret's first word

    mov     rdi, rbp
    call    give_page
    test    rax, rax
    jnz     refused
    lea     rdi, [rip + given]
    call    print

    mov     rax, [rbp]
    lea     rdi, [rip + zeros]
    test    rax, rax
    jz      say
    lea     rdi, [rip + still]
    cmp     rax, r8
    je      say
    lea     rdi, [rip + other]
say:
    call    print
    mov     qword ptr [rbp], 1
    lea     rdi, [rip + used]
    call    print
    jmp     power_off

refused:
    lea     rdi, [rip + refused_text]
    call    print
    jmp     power_off

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
secret:
    .asciz  "guest secret: the host must never read this line"
