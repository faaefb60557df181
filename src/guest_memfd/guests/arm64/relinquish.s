// A page goes back to the host with the guest's consent, and is touched again.
// The guest writes its secret to the page in the middle of its private memory, then lets go of the page: under pKVM it scrubs
// the page first, because sharing shows the bytes; Gunyah clears it when the host takes it. Afterwards it reads the page:
// the secret (nobody took it), zeros (it was scrubbed or replaced), or something else (the host wrote).

_start:
    bl      enter
    lsr     x26, x22, #1
    add     x26, x26, x21
    and     x26, x26, #~(PAGE - 1)              // the page
    mov     x0, x26
    adr     x1, secret
    bl      copy
    ldr     x27, [x26]                          // the secret's first word

    cmp     x20, #PKVM
    b.ne    give
    mov     x0, x26
    mov     x1, #PAGE
scrub:
    stp     xzr, xzr, [x0], #16
    subs    x1, x1, #16
    b.ne    scrub
give:
    mov     x0, x26
    bl      open_page
    cbnz    x0, refused
    adr     x0, given
    bl      print                               // the console is where the host notices, and may take the page

    ldr     x28, [x26]
    adr     x0, zeros
    cbz     x28, say
    adr     x0, still
    cmp     x28, x27
    b.eq    say
    adr     x0, other
say:
    bl      print
    mov     x0, #1
    str     x0, [x26]                           // a write: Gunyah locks the page again
    adr     x0, used
    bl      print
    b       power_off
refused:
    adr     x0, refused_text
    bl      print
    b       power_off

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
    .asciz  "the hypervisor refused to take the page\n"
secret:
    .asciz  "guest secret: the host must never read this line"
    .align  3
