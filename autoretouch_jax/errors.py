"""The errors a user can mend. Each message says what was wrong, where, and what to do."""


class Refused(Exception):
    """The request cannot be carried out as given, and nothing has been started or written.

    The command line prints the message on one line and exits with status 2.
    """


class BadInput(Exception):
    """A file broke in the middle of a job. The job keeps what it has and exits with status 1."""
