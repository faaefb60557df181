# Memory that both sides may use: a line is left at the beginning of the shared window for the host to read.

_start:
    call    enter
    test    r15, r15
    jz      no_window
    mov     rdi, r14
    lea     rsi, [rip + shared_line]
    call    copy
    lea     rdi, [rip + done]
    call    print
    jmp     power_off

no_window:
    lea     rdi, [rip + no_window_text]
    call    print
    jmp     power_off

shared_line:
    .asciz  "guest was here"
done:
    .asciz  "line left in the shared window\n"
no_window_text:
    .asciz  "there is no shared window\n"
