// Calls that make no sense; each result is printed. A function that does not exist has to give -1 (SMCCC NOT_SUPPORTED), the
// others any error; and none may do anything.

_start:
    bl      enter
    ldr     x0, =0xc600ffff                     // nobody's function
    hvc     #0
    bl      result
    ldr     x0, =PSCI_SYSTEM_OFF
    hvc     #0x1234                             // SMCCC wants an immediate of 0
    bl      result
    add     x0, x21, #8                         // no page
    bl      open_page
    bl      result
    add     x0, x21, x22                        // not its own page
    bl      open_page
    bl      result
    mov     x0, #-PAGE                          // wraps around
    bl      open_page
    bl      result
    b       power_off

result:
    mov     x26, x30
    bl      print_hex
    adr     x0, newline
    bl      print
    mov     x30, x26
    ret
    .ltorg
