"""What went wrong on the user's side of the command line."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that the user can mend: one message that says what is wrong, where, and what to do.

    The command line prints it without a traceback and exits with code 2.
    """


def pick(kind: str, name: str, known: Iterable[str]) -> str:
    """Return `name` if it is known.

    Raises
    ------
    UserError
        If not; it suggests the nearest one and lists them all.
    """
    names = sorted(known)
    if name in names:
        return name
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UserError(f"There is no {kind} {name!r}.{hint} Known: {', '.join(names)}.")
