# What every 64-bit guest needs; assembled behind the guest's own text.
#
# Registers after `enter`, for the rest of the guest's life:
#   rbx hypervisor   r12 private base   r13 private size   r14 shared base   r15 shared size
# At entry rdi is the address of the boot info, and the stack begins at the end of that page, as if after a call. The routines below change rax,
# rcx, rdx, rsi and rdi, and nothing else.

.equ CONSOLE, 0x09000000
.equ CONTROL, 0x09010000
.equ PAGE, 4096

# enter: rdi = boot info. Takes it apart.
enter:
    movabs  rax, 0x544f4f424d454d47             # "GMEMBOOT"
    cmp     [rdi], rax
    jne     power_off                           # nobody to tell: where the console is, is a matter of trust, too
    mov     rbx, [rdi + 8]
    mov     r12, [rdi + 16]
    mov     r13, [rdi + 24]
    mov     r14, [rdi + 32]
    mov     r15, [rdi + 40]
    ret

# print: rdi = string that ends with a zero.
print:
    mov     edx, CONSOLE
print_next:
    mov     al, [rdi]
    test    al, al
    jz      print_end
    mov     [rdx], al
    inc     rdi
    jmp     print_next
print_end:
    ret

# print_number: rdi, in decimal.
print_number:
    mov     rax, rdi
    lea     rdi, [rip + number_end]
    mov     ecx, 10
number_next:
    xor     edx, edx
    div     rcx
    add     dl, 0x30                            # '0'
    dec     rdi
    mov     [rdi], dl
    test    rax, rax
    jnz     number_next
    jmp     print

# print_hex: rdi, in 16 digits.
print_hex:
    mov     edx, CONSOLE
    mov     ecx, 64
hex_next:
    sub     ecx, 4
    mov     rax, rdi
    shr     rax, cl
    and     eax, 15
    add     al, 0x30
    cmp     al, 0x39                            # '9'
    jbe     hex_digit
    add     al, 0x27                            # 'a' - '9' - 1
hex_digit:
    mov     [rdx], al
    test    ecx, ecx
    jnz     hex_next
    ret

# copy: rdi = where to, rsi = string that ends with a zero, which is not copied.
copy:
    mov     al, [rsi]
    test    al, al
    jz      copy_end
    mov     [rdi], al
    inc     rsi
    inc     rdi
    jmp     copy
copy_end:
    ret

# give_page: rdi = address of a private page that the host may have; rax = 0 when it took it.
give_page:
    mov     edx, CONTROL
    mov     [rdx + 8], rdi
    mov     rax, [rdx + 8]
    ret

power_off:
    mov     edx, CONTROL
    mov     [rdx], rdx
    jmp     power_off                           # a store that must not come back

number_digits:
    .space  20
number_end:
    .byte   0
image_end:
