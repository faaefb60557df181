# The first page behind the private memory is not the guest's: it reads it, and if it gets that far, writes to it.
# Nothing is there for the host to answer with but ones, and a store goes nowhere.

_start:
    call    enter
    mov     rdi, [r12 + r13]
    call    print_hex
    lea     rdi, [rip + read_text]
    call    print
    mov     qword ptr [r12 + r13], -1
    lea     rdi, [rip + write_text]
    call    print
    jmp     power_off

read_text:
    .asciz  " read beyond private memory\n"
write_text:
    .asciz  "wrote beyond private memory\n"
