"""One writer per directory: a lock file with the host and the process that holds it.

The kernel's lock on the open file decides: it is released when its process ends in any way, and network file
systems share it between hosts. The content of the file is for people, and for file systems without locks.
"""

import json
import os
import pathlib
import socket
from typing import Any

from lorax_fn.core.errors import error

try:
    import fcntl
except ImportError:  # On Windows, the content of the file decides.
    fcntl = None

NAME = ".lorax_fn.lock"


class Lock:
    """The exclusive right to write in ``folder``, until `release` or the end of the process."""

    def __init__(self, folder: pathlib.Path):
        self.path = folder / NAME
        while True:
            flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
            self.file = os.fdopen(os.open(self.path, flags, 0o666), "r+", encoding="utf-8", errors="replace")
            free = _take(self.file)
            holder = _holder(self.file)
            if not free and _is_gone(holder):  # a child of a killed process still has the file open
                self.path.unlink(missing_ok=True)
            elif not free:
                self.file.close()
                raise _busy(self.path, holder)
            elif self._is_there():
                break
            self.file.close()
        self.file.seek(0)
        self.file.truncate()
        json.dump({"host": socket.gethostname(), "pid": os.getpid()}, self.file)
        self.file.flush()

    def _is_there(self) -> bool:
        """Whether the open file is still the one in the folder, as another writer may have removed it."""
        try:
            return os.path.samestat(os.fstat(self.file.fileno()), os.stat(self.path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Removes the file, then releases the lock on it."""
        if not self.file.closed:
            if self._is_there():
                self.path.unlink(missing_ok=True)
            self.file.close()


def _take(file: Any) -> bool:
    """Takes the lock of an open file and says if that worked; without locks, whether its holder is gone."""
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False
        except OSError:
            pass  # this file system has no locks
    holder = _holder(file)
    return not holder or _is_gone(holder)


def _holder(file: Any) -> dict:
    try:
        file.seek(0)
        found = json.loads(file.read(1000))
        return {"host": str(found["host"])[:100], "pid": int(found["pid"])}
    except (ValueError, TypeError, KeyError, OverflowError):
        return {}


def _is_gone(holder: dict) -> bool:
    """Whether the holder is a process of this host that has ended; for other hosts this is unknown."""
    if holder.get("host") != socket.gethostname() or not 0 < holder["pid"] < 1 << 31:
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def _busy(path: pathlib.Path, holder: dict) -> Exception:
    who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
    return error(
        "another run writes its checkpoints here.",
        path=path.parent,
        got=f"{who} holds {path.name}",
        want="one writer per directory",
        do="pass another checkpoint_dir, or end that run first.",
    )
