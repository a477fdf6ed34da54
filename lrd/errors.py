"""What a user can get wrong."""

EXIT_OK = 0
EXIT_RUN_ERROR = 1
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: saved on a signal; the same command goes on from here


class UserError(Exception):
    """An error the user can mend: one clear line that names the key, file or rank; exit status 2, no trace-back.

    Several faults found at once are joined by newlines, one line each.
    """

    status = EXIT_USER_ERROR


class RunError(UserError):
    """What ends a run that was started well: a loss that is not finite, replicas that differ. Exit status 1."""

    status = EXIT_RUN_ERROR


def first_line(error: BaseException) -> str:
    """What an exception says, in one line that is never empty."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text.splitlines()[0] if text.strip() else type(error).__name__


def describe(error: OSError) -> str:
    """An operating system's error in one line, with the file where it names one."""
    return f"{error.filename}: {first_line(error)}" if error.filename else first_line(error)
