// What every guest needs; assembled behind the guest's own text.
//
// Registers after `enter`, for the rest of the guest's life:
//   x20 hypervisor (1 Gunyah, 2 pKVM, 3 plain KVM)   x21 private base   x22 private size   x23 shared base   x24 shared size
//   x25 address of the console: an IPA while the MMU is off, and a VA once it is on
// The routines below change x0..x15 and nothing else.

.equ CONSOLE, 0x09000000
.equ PAGE, 4096
.equ GUNYAH, 1
.equ PKVM, 2

.equ PSCI_SYSTEM_OFF, 0x84000008                // Arm DEN 0022
.equ GUNYAH_ADDRSPACE_MODIFY_PAGES, 0xc6008069  // Gunyah: guest side of private memory; x1 address space (0: its own)
.equ MODIFY_PAGES_UNLOCK, 1
.equ PKVM_MEM_SHARE, 0xc6000003                 // include/linux/arm-smccc.h, ARM_SMCCC_VENDOR_HYP_KVM_MEM_SHARE_FUNC_ID
.equ PKVM_MEM_UNSHARE, 0xc6000004

// enter: x0 = boot info. Takes it apart, sets up a stack and the vectors.
enter:
    ldp     x1, x20, [x0]
    ldr     x2, =0x544f4f424d454d47             // "GMEMBOOT"
    cmp     x1, x2
    b.ne    power_off                           // nobody to tell: where the console is, is a matter of trust, too
    ldp     x21, x22, [x0, #16]
    ldp     x23, x24, [x0, #32]
    ldr     x25, =CONSOLE
    adr     x1, stack_top
    mov     sp, x1
    adr     x1, vectors
    msr     vbar_el1, x1
    isb
    ret

// print: x0 = string that ends with a zero.
print:
    ldrb    w1, [x0]
    cbz     w1, print_end
    strb    w1, [x25]
    add     x0, x0, #1
    b       print
print_end:
    ret

// print_number: x0, in decimal.
print_number:
    mov     x3, x30
    adr     x2, number_end
    mov     x4, #10
    strb    wzr, [x2]
number_next:
    udiv    x5, x0, x4
    msub    x6, x5, x4, x0
    add     w6, w6, #'0'
    sub     x2, x2, #1
    strb    w6, [x2]
    mov     x0, x5
    cbnz    x0, number_next
    mov     x0, x2
    bl      print
    mov     x30, x3
    ret

// print_hex: x0, in 16 digits.
print_hex:
    mov     x2, #60
hex_next:
    lsr     x3, x0, x2
    and     x3, x3, #15
    add     w4, w3, #'0'
    add     w5, w3, #'a' - 10
    cmp     x3, #10
    csel    x4, x4, x5, lt
    strb    w4, [x25]
    sub     x2, x2, #4
    tbz     x2, #63, hex_next
    ret

// copy: x0 = where to, x1 = string that ends with a zero, which is not copied.
copy:
    ldrb    w2, [x1], #1
    cbz     w2, copy_end
    strb    w2, [x0], #1
    b       copy
copy_end:
    ret

// open_page: x0 = IPA of a private page. The hypervisor's own way of letting the host have it; x0 = 0 when it agrees.
// Under Gunyah the page is unlocked and its bytes are cleared when the host takes it. Under pKVM host and guest share the
// page as it is, bytes included: a guest that has something to hide scrubs it before.
open_page:
    cmp     x20, #PKVM
    b.eq    open_page_pkvm
    mov     x2, x0
    mov     x3, #PAGE
    mov     x4, #MODIFY_PAGES_UNLOCK
    mov     x5, #0
    mov     x1, #0
    ldr     x0, =GUNYAH_ADDRSPACE_MODIFY_PAGES
    hvc     #0
    ret
open_page_pkvm:
    mov     x1, x0
    mov     x2, #0
    mov     x3, #0
    ldr     x0, =PKVM_MEM_SHARE
    hvc     #0
    ret

power_off:
    ldr     x0, =PSCI_SYSTEM_OFF
    hvc     #0
    b       power_off                           // a call that must not come back

// An abort that the host or the hypervisor delivered: say which, and end.
aborted:
    adr     x0, abort_text
    bl      print
    mrs     x0, esr_el1
    bl      print_hex
    adr     x0, far_text
    bl      print
    mrs     x0, far_el1
    bl      print_hex
    adr     x0, newline
    bl      print
    b       power_off

abort_text:
    .asciz  "guest: abort, esr "
far_text:
    .asciz  " far "
newline:
    .asciz  "\n"
number_digits:
    .space  20
number_end:
    .byte   0
    .balign 16
    .ltorg
stack:
    .space  512
stack_top:

// One entry of 0x80 bytes for each kind of exception; synchronous ones from EL1 with its own stack are at 0x200.
    .balign 2048
vectors:
    b       aborted
    .balign 0x80
    b       aborted
    .balign 0x80
    b       aborted
    .balign 0x80
    b       aborted
    .balign 0x80
    b       aborted
    .balign 0x80
    b       aborted
    .balign 0x80
    b       aborted
    .balign 0x80
    b       aborted
image_end:
