# All of the private memory behind the image, page by page: first every page gets a pattern of its own at both ends, then
# every page is read back. A page that was swapped, lost or mapped twice cannot hold both words. Prints how many pages hold.

_start:
    call    enter
    lea     rsi, [rip + image_end]
    add     rsi, PAGE - 1
    and     rsi, -PAGE                          # first page behind the image
    add     rsi, PAGE                           # and behind the boot info's, where the stack is
    lea     rdi, [r12 + r13]                    # end
    movabs  r8, 0x9e3779b97f4a7c15

    mov     rcx, rsi
write_next:
    cmp     rcx, rdi
    jae     read
    mov     rax, rcx
    xor     rax, r8
    mov     [rcx], rax
    mov     [rcx + PAGE - 8], rax
    add     rcx, PAGE
    jmp     write_next

read:
    xor     ebp, ebp
read_next:
    cmp     rsi, rdi
    jae     report
    mov     rax, rsi
    xor     rax, r8
    cmp     [rsi], rax
    jne     lost
    cmp     [rsi + PAGE - 8], rax
    jne     lost
    inc     rbp
    add     rsi, PAGE
    jmp     read_next

report:
    mov     rdi, rbp
    call    print_number
    lea     rdi, [rip + hold]
    call    print
    jmp     power_off

lost:
    push    rsi
    lea     rdi, [rip + lost_text]
    call    print
    pop     rdi
    call    print_hex
    lea     rdi, [rip + newline]
    call    print
    jmp     power_off

hold:
    .asciz  " pages hold what was written\n"
lost_text:
    .asciz  "lost page "
newline:
    .asciz  "\n"
