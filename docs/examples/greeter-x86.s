# A guest that says how much memory it has, writes to the last page of it, and turns itself off.

_start:
    call    enter                               # rdi: boot info; then r12 private base, r13 size
    lea     rdi, [rip + text]
    call    print
    mov     rdi, r13
    shr     rdi, 12
    call    print_number
    lea     rdi, [rip + pages]
    call    print
    mov     [r12 + r13 - 8], r13                # faulted in here, for the first time
    jmp     power_off

text:
    .asciz  "greetings from "
pages:
    .asciz  " pages\n"
