"""The one exception that a user is meant to read."""

import difflib
from collections.abc import Iterable

SHOWN = 50
"""Names that a message lists at most: timm has more than a thousand models."""


class UserError(Exception):
    """A mistake that the user can mend: one plain sentence with what is wrong, where, and what to do.

    The command line prints it without a traceback and exits with code 2.
    """


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the known word nearest to `word`, or a list of them when none is near."""
    names = sorted(known)
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    near = difflib.get_close_matches(word, names, n=1)
    return f" Did you mean '{near[0]}'?" if near else f" Known: {', '.join(names[:SHOWN])}{more}."
