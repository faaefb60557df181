# What every real-mode guest needs; assembled behind the guest's own text. It enters like a boot sector, at 0:0x7c00; cs and
# ds are 0, es:di points to the boot info, and the stack begins at the end of that page, in the same segment.
#
# Of the boot info the low words are enough here: a real-mode guest reaches the first MiB. The routines change eax, dx and
# si, and nothing else.

.equ CONSOLE, 0xe9
.equ CONTROL, 0xea

# enter: es:di = boot info.
enter:
    cmp     dword ptr es:[di], 0x4d454d47       # "GMEM"
    jne     power_off
    cmp     dword ptr es:[di + 4], 0x544f4f42   # "BOOT"
    jne     power_off
    ret

# print: si = string that ends with a zero.
print:
    mov     dx, CONSOLE
print_next:
    lodsb
    test    al, al
    jz      print_end
    out     dx, al
    jmp     print_next
print_end:
    ret

# give_page: eax = address of a page that the host may have; eax = 0 when it took it.
give_page:
    mov     dx, CONTROL
    out     dx, eax
    in      eax, dx
    ret

power_off:
    hlt
    jmp     power_off
