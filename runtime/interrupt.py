"""A flag by which a wait for the device ends at once."""

from __future__ import annotations

import ctypes

__all__ = ["Interrupt"]


class Interrupt:
    """Set from any thread, without a lock; native code reads it at ``address`` without the interpreter's.

    Attributes:
        address: of an int32 that is 0 while the flag is not set.
    """

    __slots__ = ("_word", "address")

    def __init__(self) -> None:
        self._word = ctypes.c_int32(0)
        self.address = ctypes.addressof(self._word)

    def set(self) -> None:
        """Whoever waits, and whoever waits next, goes on."""
        self._word.value = 1

    def clear(self) -> None:
        """What set it so far has been seen to."""
        self._word.value = 0

    def __bool__(self) -> bool:
        return self._word.value != 0
