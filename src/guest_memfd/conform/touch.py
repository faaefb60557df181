"""A load or a store by the CPU that survives its signal: which it was, its code, and the address.

Python cannot go on after a SIGBUS: its handlers run when the instruction has been finished, which it never is. This handler
is a few instructions of our own. It notes the signal (siginfo_t) and lets the program go on after the access: it changes the
saved instruction pointer (ucontext_t; uapi/asm/sigcontext.h of the architecture).
"""

from __future__ import annotations

import ctypes
import platform
import signal
from ctypes import CFUNCTYPE, c_uint64
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, PROT_EXEC, PROT_READ, PROT_WRITE

from guest_memfd.errors import HostUnavailable, Signalled
from guest_memfd.guests.target import ARM64, X86_64, Target
from guest_memfd.linux import syscall

_X86 = """
load:
    mov rax, [rdi]
    ret
store:
    mov [rdi], rsi
    ret
handler:
    mov rax, [rdx + 168]                        # uc_mcontext.gregs[REG_RIP]
    mov rcx, {at:#x}
    sub rax, rcx
    cmp rax, 4096
    jae foreign
    mov rcx, {note:#x}
    mov [rcx], rdi
    mov eax, [rsi + 8]                          # si_code
    mov [rcx + 8], rax
    mov rax, [rsi + 16]                         # si_addr
    mov [rcx + 16], rax
    mov rax, {recover:#x}
    mov [rdx + 168], rax
    ret
foreign:
    ud2                                         # an access that is not ours: the process dies of it
restorer:
    mov eax, 15                                 # rt_sigreturn
    syscall
recover:
    ret
"""
_ARM64 = """
load:
    ldr x0, [x0]
    ret
store:
    str x1, [x0]
    ret
handler:
    ldr x4, [x2, #440]                          // uc_mcontext.pc
    adr x3, load
    sub x4, x4, x3
    cmp x4, #4095
    b.hi foreign
    ldr x3, note
    str x0, [x3]
    ldr w4, [x1, #8]                            // si_code
    str x4, [x3, #8]
    ldr x4, [x1, #16]                           // si_addr
    str x4, [x3, #16]
    adr x4, recover
    str x4, [x2, #440]
restorer:
recover:
    ret
foreign:
    brk #0                                      // an access that is not ours: the process dies of it
    .align 3
note:
    .quad {note:#x}
"""
_SOURCES = {"x86_64": (X86_64, _X86, 13), "aarch64": (ARM64, _ARM64, 134)}
"""By machine: what assembles it, the code, and the number of rt_sigaction(2)."""
_SA_SIGINFO, _SA_RESTORER, _SA_NODEFER = 4, 0x0400_0000, 0x4000_0000
_SIZE, _NOTE = 4096, 2048


class Toucher:
    """Loads and stores of 8 bytes. Raises HostUnavailable on a machine whose code is not known, SyscallFailed.

    Made once, and inherited by children; each that touches anything calls `arm` first.
    """

    def __init__(self) -> None:
        machine = platform.machine()
        if machine not in _SOURCES:
            raise HostUnavailable(f"loads that survive a signal are known for {', '.join(_SOURCES)}, not for {machine}")
        target, source, self._sigaction = _SOURCES[machine]
        at = syscall.mmap(-1, 0, _SIZE, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS)
        symbols = self._put(target, source, at)
        self._note = (c_uint64 * 3).from_address(at + _NOTE)
        self._load = CFUNCTYPE(c_uint64, c_uint64)(symbols["load"])
        self._store = CFUNCTYPE(None, c_uint64, c_uint64)(symbols["store"])
        # The kernel's struct sigaction, and not the C library's. x86 puts no frame on the stack without SA_RESTORER: it
        # has no trampoline of its own for 64-bit programs (arch/x86/kernel/signal_64.c). On arm64 the vDSO has one.
        action = (c_uint64 * 4)(symbols["handler"], _SA_SIGINFO | _SA_RESTORER | _SA_NODEFER, symbols["restorer"], 0)
        if target is ARM64:
            action = (c_uint64 * 4)(symbols["handler"], _SA_SIGINFO | _SA_NODEFER, 0, 0)
        self._action = action

    def arm(self) -> None:
        """From now on SIGBUS and SIGSEGV of this process are this handler's."""
        # In the children alone: in the parent a signal of this kind is a mistake of ours, and has to end it.
        for number in (signal.SIGBUS, signal.SIGSEGV):
            syscall.raw(self._sigaction, int(number), self._action, 0, 8, call="rt_sigaction")

    # Assembled twice: where `recover` is, is known only then; a label's place does not depend on the numbers.
    @staticmethod
    def _put(target: Target, source: str, at: int) -> dict[str, int]:
        first = target.assemble(source.format(at=at, note=at + _NOTE, recover=at), at, "touch")
        code = target.assemble(source.format(at=at, note=at + _NOTE, recover=first.symbols["recover"]), at, "touch")
        ctypes.memmove(at, code.data, len(code.data))
        return dict(code.symbols)

    def load(self, address: int) -> int:
        """The 8 bytes at *address*; raises Signalled."""
        # The number of a signal is never 0: it says whether there was one. What the load returned is worthless then.
        self._note[0] = 0
        value = int(self._load(address))
        self._survived()
        return value

    def store(self, address: int, value: int) -> None:
        """*value* to the 8 bytes at *address*; raises Signalled."""
        self._note[0] = 0
        self._store(address, value)
        self._survived()

    def _survived(self) -> None:
        number, code, address = self._note
        if number:
            raise Signalled(signal.Signals(number).name, address, code)
