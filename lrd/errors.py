"""Errors that a user can fix, and the exit statuses of a run."""

EXIT_OK = 0
EXIT_RUN_ERROR = 1
EXIT_USER_ERROR = 2

# EX_TEMPFAIL of sysexits.h: a signal stopped the run and its state is saved, so that the same
# command resumes it.
EXIT_STOPPED = 75


class UserError(Exception):
    """An error that the user can fix; it is printed without a traceback, and the status is 2.

    Its message is one clear line that names the key, file or rank. If several faults are found at
    once, the message has one line for each.
    """

    status = EXIT_USER_ERROR


class RunError(UserError):
    """An error that ends a run after it has started; the exit status is 1.

    Examples are a loss that is not finite, and replicas that differ.
    """

    status = EXIT_RUN_ERROR


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, or the name of its type if it has no text."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror
    lines = text.strip().splitlines()
    return lines[0] if lines else type(error).__name__


def describe_os_error(error: OSError) -> str:
    """An error of the operating system in one line, with the file if the error names one."""
    reason = first_line(error)
    return f"{error.filename}: {reason}" if error.filename else reason
