"""Braces in names, as a shell expands them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator


def braces(pattern: str) -> Iterator[str]:
    """Yield what bash makes of the braces in `pattern`: "{a,b}", "{00..12}", "{a..e}", "{0..100..10}", nested.

    Braces without a counterpart, a comma or a range are plain characters.
    """
    start = pattern.find("{")
    if start < 0:
        yield pattern
        return
    before, (words, end) = pattern[:start], _words(pattern, start)
    for word in words:
        for middle in braces(word) if end > start + 1 else [word]:
            for rest in braces(pattern[end:]):
                yield before + middle + rest


def _words(pattern: str, start: int) -> tuple[Iterable[str], int]:
    """Return what the brace at `start` stands for, and where its counterpart ends: itself if it is a plain one."""
    depth, cuts = 0, [start]
    for at in range(start, len(pattern)):
        depth += (pattern[at] == "{") - (pattern[at] == "}")
        if depth == 1 and pattern[at] == ",":
            cuts.append(at)
        elif depth == 0:
            if len(cuts) > 1:
                return [pattern[a + 1 : b] for a, b in itertools.pairwise([*cuts, at])], at + 1
            counted = _count(pattern[start + 1 : at])
            return (["{"], start + 1) if counted is None else (counted, at + 1)
    return ["{"], start + 1


def _count(words: str) -> Iterable[str] | None:
    """Return the words of "first..last" or "first..last..step", numbers or letters; None for anything else."""
    found = re.fullmatch(r"(-?\d+|[A-Za-z])\.\.(-?\d+|[A-Za-z])(?:\.\.(-?\d+))?", words, re.ASCII)
    if found is None or found[1].isalpha() != found[2].isalpha():
        return None
    letters = found[1].isalpha()
    first, last = (ord(found[1]), ord(found[2])) if letters else (int(found[1]), int(found[2]))
    step = (abs(int(found[3] or 1)) or 1) * (1 if first <= last else -1)
    numbers = range(first, last + (1 if step > 0 else -1), step)
    padded = any(re.match(r"-?0\d", word) for word in found.group(1, 2))
    width = max(len(found[1]), len(found[2])) if padded else 0
    return (chr(n) if letters else str(n).zfill(width) for n in numbers)
