// Memory that both sides may use: a line is left at the beginning of the shared window for the host to read.
// Gunyah's host has set the window up. A page of a pKVM guest is private until the guest itself shares it.

_start:
    bl      enter
    cbz     x24, no_window
    cmp     x20, #PKVM
    b.ne    leave_line
    mov     x0, x23
    bl      open_page
    cbnz    x0, refused
leave_line:
    mov     x0, x23
    adr     x1, shared_line
    bl      copy
    adr     x0, done
    bl      print
    b       power_off

refused:
    adr     x0, refused_text
    bl      print
    b       power_off
no_window:
    adr     x0, no_window_text
    bl      print
    b       power_off

shared_line:
    .asciz  "guest was here"
done:
    .asciz  "line left in the shared window\n"
refused_text:
    .asciz  "the hypervisor refused to share\n"
no_window_text:
    .asciz  "there is no shared window\n"
    .align  3
