// The first page behind the private memory is not the guest's: it reads it, and if it gets that far, writes to it.
// An abort that is delivered to the guest is printed by the vectors of common.s.

_start:
    bl      enter
    add     x26, x21, x22
    ldr     x0, [x26]
    adr     x0, read_text
    bl      print
    mov     x0, #-1
    str     x0, [x26]
    adr     x0, write_text
    bl      print
    b       power_off

read_text:
    .asciz  "read beyond private memory\n"
write_text:
    .asciz  "wrote beyond private memory\n"
    .align  3
