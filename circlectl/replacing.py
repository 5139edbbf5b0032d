"""Files that are replaced atomically."""

from __future__ import annotations

import contextlib
import os


def replace(path: str, content: bytes, mode: int | None = None) -> None:
    """Put a new file with that mode, by default the umask's, in the place of `path`. A link is replaced itself.

    Raises OSError, which names `path`.
    """
    new = f"{path}.{os.getpid()}"
    try:
        with contextlib.suppress(FileNotFoundError):  # left behind by an unfinished process with the same pid
            os.unlink(new)
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666 if mode is None else mode)
        with os.fdopen(fd, "wb") as file:
            file.write(content)
            if mode is not None:
                os.fchmod(fd, mode)
        os.replace(new, path)
    except OSError as exc:  # of writing, which names no file, or names the new one
        with contextlib.suppress(OSError):
            os.unlink(new)
        raise OSError(exc.errno, exc.strerror, path) from exc
