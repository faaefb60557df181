// The smallest life of a confidential guest: it prints a line, and keeps a secret in the last page of its private memory.
// The page is touched here for the first time, so it is faulted in while the guest runs. Whoever looks at the host's memory
// afterwards must not find the secret.

_start:
    bl      enter
    adr     x0, line
    bl      print
    add     x0, x21, x22
    sub     x0, x0, #PAGE
    adr     x1, secret
    bl      copy
    adr     x0, done
    bl      print
    b       power_off

line:
    .asciz  "hello from a guest\n"
done:
    .asciz  "secret written\n"
secret:
    .asciz  "guest secret: the host must never read this line"
    .align  3
