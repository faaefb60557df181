// The guest's own stage 1, over whatever stage 2 the hypervisor has: 4 KiB granule, 39-bit addresses, 2 MiB blocks.
//
//   VA 0x4000_0000  the console, Device-nGnRnE
//   VA 0x4020_0000  the block that holds the image, once more
//   VA = IPA        the block that holds the image
//
// It prints through the console's new address, and looks at itself through the second mapping. The private base must not lie
// in the second gigabyte, where the console is.

.equ CONSOLE_VA, 0x40000000
.equ ALIAS_VA, 0x40200000
.equ BLOCK, 0x200000
.equ AF_INNER_BLOCK, 1 << 10 | 3 << 8 | 1       // access flag, inner shareable, block descriptor; AttrIndx 0
.equ DEVICE, 1 << 54 | 1 << 53 | 1 << 2         // UXN, PXN, AttrIndx 1
.equ MAIR, 0x00ff                               // 0: normal write-back, 1: Device-nGnRnE
.equ TCR, 2 << 32 | 1 << 23 | 3 << 12 | 1 << 10 | 1 << 8 | 25   // 40-bit IPA, EPD1, inner shareable write-back, T0SZ 25

_start:
    bl      enter
    adr     x0, off_text
    bl      print

    adr     x0, level1
    adr     x1, level2_low
    orr     x2, x1, #3                          // table descriptor
    str     x2, [x0, #8]                        // the second gigabyte
    mov     x3, #CONSOLE
    ldr     x4, =AF_INNER_BLOCK | DEVICE
    orr     x3, x3, x4
    str     x3, [x1]
    and     x5, x21, #~(BLOCK - 1)
    mov     x4, #AF_INNER_BLOCK
    orr     x6, x5, x4
    str     x6, [x1, #8]

    adr     x1, level2_image
    orr     x2, x1, #3
    lsr     x3, x21, #30
    str     x2, [x0, x3, lsl #3]
    ubfx    x3, x21, #21, #9
    str     x6, [x1, x3, lsl #3]

    mov     x2, #MAIR
    msr     mair_el1, x2
    ldr     x2, =TCR
    msr     tcr_el1, x2
    msr     ttbr0_el1, x0
    dsb     sy
    isb
    tlbi    vmalle1
    dsb     sy
    isb
    mrs     x2, sctlr_el1
    orr     x2, x2, #1
    msr     sctlr_el1, x2
    isb

    mov     x25, #CONSOLE_VA
    adr     x0, on_text
    bl      print
    adr     x0, _start                          // the same word at both addresses
    ldr     w1, [x0]
    and     x0, x0, #BLOCK - 1
    mov     x2, #ALIAS_VA
    ldr     w3, [x2, x0]
    cmp     w1, w3
    b.ne    differs
    adr     x0, same_text
    bl      print
    b       power_off
differs:
    adr     x0, differs_text
    bl      print
    b       power_off

off_text:
    .asciz  "MMU off\n"
on_text:
    .asciz  "MMU on\n"
same_text:
    .asciz  "second mapping agrees\n"
differs_text:
    .asciz  "second mapping differs\n"
    .align  3
    .ltorg
    .balign 4096
level1:
    .space  4096
level2_low:
    .space  4096
level2_image:
    .space  4096
