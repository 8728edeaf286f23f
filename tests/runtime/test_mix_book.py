"""Which mixes are kept, and of which sizes."""

from __future__ import annotations

from torch_mux.runtime.mixes import MixBook, rounded


def test_sizes_are_rounded_to_few() -> None:
    assert [rounded(slots) for slots in range(1, 14)] == [1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12, 12, 16]
    assert len({rounded(slots) for slots in range(1, 65)}) == 12
    assert all(slots <= rounded(slots) <= 1.5 * slots for slots in range(2, 500))


def test_the_book_forgets_what_was_used_longest_ago() -> None:
    book = MixBook(most=2)
    one = book.see((("a", 1), ("b", 1)), ["A", "B"], 0.0)
    two = book.see((("a", 2), ("b", 1)), ["A", "B"], 0.0)
    assert book.see((("a", 1), ("b", 1)), ["A", "B"], 0.0) is one
    book.see((("a", 3), ("b", 1)), ["A", "B"], 0.0)
    assert book.knows(one) and not book.knows(two)
