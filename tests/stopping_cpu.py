"""A CPU that stops as told, for tests of what handles its stops."""

from __future__ import annotations

from typing import Any

from guest_memfd.machine.hw.arm64 import cpu as stops


class Script:
    """A CPU that stops as told: each entry is a stop, or a function that is called first and returns it."""

    def __init__(self, *script: Any, words: dict[int, int] | None = None) -> None:
        self.script, self.regs, self.pc, self.words = list(script), [0] * 31, 0x1000, words or {}
        self.exceptions: list[tuple[int, int | None]] = []

    def run(self, timeout: float | None = None, instructions: int | None = None) -> Any:
        stop = self.script.pop(0)
        return stop() if callable(stop) and not isinstance(stop, tuple) else stop

    def x(self, n: int) -> int:
        return self.regs[n]

    def set_x(self, n: int, value: int) -> None:
        self.regs[n] = value & ((1 << 64) - 1)

    def fetch(self, va: int) -> int:
        return self.words[va]

    def take_exception(self, esr: int, far: int | None = None) -> None:
        self.exceptions.append((esr, far))

    def call(self, number: int, *args: int) -> Any:
        def stop() -> Any:
            self.regs[:4] = [number, *args, 0, 0, 0][:4]
            self.pc += 4
            return stops.Hvc(0)
        return stop
