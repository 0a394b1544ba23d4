"""One process writes a folder: a lock file beside it, with host, process and a heartbeat."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raev2.errors import FileError
from raev2.training import dist

logger = logging.getLogger(__name__)
BEAT_S, STALE_S = 20.0, 600.0


class BusyError(FileError):
    """Another process writes this folder."""


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a run, data set or cache that is written (main process); BusyError while another process does.

    The lock of a process that is gone from this machine, or whose heart stopped on another one, is taken over.
    """
    if not dist.is_main():
        yield
        return
    folder = folder.resolve()
    file = folder.with_name(f".{folder.name}.lock")
    file.parent.mkdir(parents=True, exist_ok=True)
    _take(file)
    done = threading.Event()
    threading.Thread(target=_beat, args=(file, done), daemon=True).start()
    try:
        yield
    finally:
        done.set()
        file.unlink(missing_ok=True)


def _take(file: Path) -> None:
    """Write our name into the lock; whoever else looks at it meanwhile waits until we have."""
    own: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid()}
    with file.open("a+", encoding="utf-8") as opened:
        if os.name == "posix":
            import fcntl

            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(opened, fcntl.LOCK_EX)
        if not file.exists() or not os.path.samestat(os.fstat(opened.fileno()), file.stat()):
            return _take(file)  # its holder was done while we waited
        opened.seek(0)
        if text := opened.read():
            _check_stale(file, text, own["host"])
        opened.truncate(0)
        json.dump(own, opened)


def _check_stale(file: Path, text: str, our_host: str) -> None:
    holder: dict[str, Any] = {"host": "an unknown host", "pid": 0}
    with contextlib.suppress(ValueError):  # it was cut short
        holder |= json.loads(text)
    age = time.time() - file.stat().st_mtime
    here = holder["host"] == our_host and os.name == "posix"
    if (here and _is_alive(holder["pid"])) or (not here and age < STALE_S):
        raise BusyError(
            str(file), "another process writes this folder",
            got=f"process {holder['pid']} on {holder['host']}, heard of {age:.0f} s ago",
            hint="Wait for it or stop it; delete this file if it does not run.",
        )  # fmt: skip
    logger.warning("%s: taken over, process %s on %s is gone", file, holder["pid"], holder["host"])


def _is_alive(pid: int) -> bool:
    """Whether a process of this machine runs; our own number is left from before a restart of the machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        return True
    return pid != os.getpid()


def _beat(file: Path, done: threading.Event) -> None:
    while not done.wait(BEAT_S):
        with contextlib.suppress(OSError):
            os.utime(file)
