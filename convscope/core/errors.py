"""The one exception for mistakes a user can mend."""


class UserError(Exception):
    """Bad input, told in one line: what is wrong, where, and what to do. The command line exits with 2."""
