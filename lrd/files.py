"""Writes to files, which a full disk or a kill may interrupt anywhere."""

from __future__ import annotations

import os
from pathlib import Path

from lrd.errors import first_line


def append(path: Path, content: bytes, valid_size: int) -> int:
    """Write to the end of a file, which is created if it does not exist.

    Args:
        content: what to write.
        valid_size: bytes of the file that are complete. What follows them was left by a write that
            failed, and is cut off.

    Returns:
        The new size of the file, in bytes.

    Raises:
        OSError: not all could be written; the error names the file. Call again with the same
            arguments, and nothing is written twice.
    """
    try:
        with path.open("ab", buffering=0) as stream:
            if stream.tell() > valid_size:
                stream.truncate(valid_size)

            written = 0
            while written < len(content):
                written += stream.write(content[written:])
    except OSError as error:
        raise OSError(error.errno, first_line(error), str(path)) from error
    return valid_size + len(content)


def replace(path: Path, content: bytes) -> int:
    """Write a whole file anew. Readers see either the old file or the new one.

    Returns:
        The size of the new file, in bytes.

    Raises:
        OSError: it could not be written; the error names the file. The old one is untouched.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, first_line(error), str(path)) from error
    return len(content)


def sync(path: Path, drop_cache: bool = False) -> None:
    """Wait until all that was written to a file, or the names in a folder, are on the disk.

    Args:
        drop_cache: also drop a file from the system's cache. Who verifies it afterwards would
            otherwise read the cache and not the disk.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if drop_cache and hasattr(os, "posix_fadvise") and not path.is_dir():
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
