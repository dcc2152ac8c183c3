"""What went wrong on the user's side of the command line."""


class UserError(Exception):
    """A mistake that the user can mend: one message that says what is wrong, where, and what to do.

    The command line prints it without a traceback and exits with code 2.
    """
