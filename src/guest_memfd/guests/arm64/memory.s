// All of the private memory behind the image, page by page: first every page gets a pattern of its own at both ends, then
// every page is read back. A page that was swapped, lost or mapped twice cannot hold both words. Prints how many pages hold.

_start:
    bl      enter
    adr     x26, image_end
    add     x26, x26, #PAGE - 1
    and     x26, x26, #~(PAGE - 1)              // first page behind the image
    add     x27, x21, x22                       // end
    ldr     x28, =0x9e3779b97f4a7c15

    mov     x0, x26
write_next:
    cmp     x0, x27
    b.hs    read
    eor     x1, x0, x28
    str     x1, [x0]
    str     x1, [x0, #PAGE - 8]
    add     x0, x0, #PAGE
    b       write_next

read:
    mov     x0, x26
    mov     x19, #0
read_next:
    cmp     x0, x27
    b.hs    report
    eor     x1, x0, x28
    ldr     x2, [x0]
    ldr     x3, [x0, #PAGE - 8]
    cmp     x1, x2
    b.ne    lost
    cmp     x1, x3
    b.ne    lost
    add     x19, x19, #1
    add     x0, x0, #PAGE
    b       read_next

report:
    mov     x0, x19
    bl      print_number
    adr     x0, hold
    bl      print
    b       power_off

lost:
    mov     x19, x0
    adr     x0, lost_text
    bl      print
    mov     x0, x19
    bl      print_hex
    adr     x0, newline
    bl      print
    b       power_off

hold:
    .asciz  " pages hold what was written\n"
lost_text:
    .asciz  "lost page "
    .align  3
