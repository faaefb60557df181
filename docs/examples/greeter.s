// A guest that says how much memory it has, writes to the last page of it, and turns itself off.

_start:
    bl      enter                               // x0: boot info; then x21 private base, x22 size
    adr     x0, text
    bl      print
    lsr     x0, x22, #12
    bl      print_number
    adr     x0, pages
    bl      print
    add     x26, x21, x22
    str     x22, [x26, #-8]                     // faulted in here, for the first time
    b       power_off

text:
    .asciz  "greetings from "
pages:
    .asciz  " private pages\n"
    .align  3
