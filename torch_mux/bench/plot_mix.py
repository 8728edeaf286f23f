"""What was matched across architectures: ``python -m torch_mux.bench.plot_mix mix.json --row four``.

Reads a record of ``python -m torch_mux.bench.mix`` and prints, of the largest mix that ran as one, how many
launches each group of matching operations became, and some words of its schedule; ``--page`` puts the text
between the lines of a page that are kept for it.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from torch_mux.bench import measure
from torch_mux.bench.mix_contenders import CONTENDERS, name_of
from torch_mux.bench.plot import fill

__all__ = ["main", "matched", "text"]

_TIMES: Final = re.compile(r"   \((\d+) times\)$")
_EXCERPT: Final = 6


def matched(words: str) -> Counter[str]:
    """Launches for several programs, by what they do; of a schedule's text."""
    found: Counter[str] = Counter()
    for line in words.splitlines():
        times = _TIMES.search(line)
        count = int(times.group(1)) if times else 1
        for strand in _TIMES.sub("", line).split(" | "):
            for step in re.sub(r"^\[\d+\] ", "", strand).split("; "):
                if step.startswith("(") and step.endswith(")"):
                    found[step[1:-1]] += count
    return found


def largest(report: Mapping[str, Any], row: str, contender: str) -> Mapping[str, Any] | None:
    """The mix with most requests that ran as one there."""
    mixes = [
        mix
        for record in report["results"]
        if record["row"] == row and record["contender"] == contender
        for mix in record.get("notes", {}).get("mixes", ())
        if mix["joint"] and mix["words"]
    ]
    return max(mixes, key=lambda mix: sum(slots for _, slots in mix["members"]), default=None)


def text(report: Mapping[str, Any], mix: Mapping[str, Any]) -> str:
    """Markdown: what the mix is, what was matched in it, and words of its schedule."""
    facts, groups = report["environment"], matched(mix["words"])
    members = " + ".join(f"{name} x{slots}" for name, slots in mix["members"])
    predicted = f"{1e6 * mix['seconds']:.0f} µs predicted, {1e6 * mix['serial']:.0f} one after another"
    lines = [
        f"{members}, {facts['device']}, torch {facts['torch']}, commit {str(facts['commit'])[:12]}:",
        f"{mix['launches']} super-kernel launches, {mix['matched']} of them joint; {predicted}.",
    ]
    if mix.get("measured"):
        lines[-1] += f" {mix['measured'].capitalize()}."
    lines += ["", "| launches | what one launch did |", "|---|---|"]
    lines += [f"| {count} | {what} |" for what, count in groups.most_common()] or ["| 0 | nothing matched |"]
    return "\n".join([*lines, "", "```", *_excerpt(mix["words"]), "```"])


def _excerpt(words: str) -> list[str]:
    """The first words, and those after them that have a joint launch."""
    lines = words.splitlines()
    rest = [line for line in lines[_EXCERPT:] if matched(line)]
    return [*lines[:_EXCERPT], *["…"] * bool(rest), *rest[:_EXCERPT], "…"]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the text, or writes it into a page; 2 where the record has no such mix."""
    flags = argparse.ArgumentParser(prog="python -m torch_mux.bench.plot_mix", description=__doc__)
    flags.add_argument("record", type=Path, help="what torch-mux bench mix --json wrote")
    flags.add_argument("--row", default="four", help="of the record")
    flags.add_argument("--contender", default="packed", choices=sorted(CONTENDERS), help="of the record")
    flags.add_argument("--page", type=Path, default=None, help="fill this page's block")
    options = flags.parse_args(argv)
    report = measure.read(flags, options.record)
    mix = largest(report, options.row, name_of(options.contender))
    if mix is None:
        flags.error(f"in {options.record.name} no mix of {options.row} ran as one with {options.contender}")
    block = text(report, mix)
    if options.page is None:
        print(block)
    else:
        options.page.write_text(fill(options.page.read_text(), block))
    return 0


if __name__ == "__main__":
    sys.exit(main())
