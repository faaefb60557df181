# The smallest life of a guest: it prints a line, and writes a secret to the last page of its private memory.
# The page is touched here for the first time, so it is faulted in while the guest runs.

_start:
    call    enter
    lea     rdi, [rip + line]
    call    print
    lea     rdi, [r12 + r13 - PAGE]
    lea     rsi, [rip + secret]
    call    copy
    lea     rdi, [rip + done]
    call    print
    jmp     power_off

line:
    .asciz  "hello from a guest\n"
done:
    .asciz  "secret written\n"
secret:
    .asciz  "guest secret: the host must never read this line"
