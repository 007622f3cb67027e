"""Leases: one worker at a time on a cell, however many machines share the study's folder, also over NFS.

A lease is a file `leases/NUMBER.json` of the cell's folder; the one with the highest number counts. It is free when its
owner has released it, when its process is gone (seen from the same machine), or when it gave no sign of life (a new
time of modification) for a time limit. To take a cell is to create the file with the next number, which a file system
lets a single worker do (O_EXCL; NFS since version 3). No number is used twice, so a judgement about an old lease cannot
meet a new one: of two workers who find the same dead owner one gets the next number, and the other gets nothing.

Clocks of machines may differ: the age of a lease is read from the shared file system's clock alone.
"""

import _thread
import json
import logging
import os
import signal
import socket
import tempfile
import threading
import time
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from xlfa.files import write_text

logger = logging.getLogger(__name__)

LEASES_FOLDER = "leases"
LEASE_SECONDS = 300.0
# Signs of life within the time limit.
SIGNS = 6


class LeaseLost(Exception):
    """Another worker has taken the cell over: what this one does no longer counts."""


class Lease:
    """A cell that this process runs; as a context it gives signs of life and is released at the end.

    Where another worker takes the cell over (this process was suspended, or the file system away, for longer than the
    time limit), the main thread gets a SIGTERM: `lost` tells it from others.
    """

    def __init__(self, path: Path, seconds: float):
        self.path, self.seconds = path, seconds
        self.lost = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name=f"lease {path}", daemon=True)

    def __enter__(self) -> "Lease":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        if not self.lost:
            write_text(self.path, json.dumps({"released": _now()}) + "\n")

    def confirm(self) -> None:
        """Raise `LeaseLost` if another worker has the cell."""
        self.lost = self.lost or _path(self.path.parent, _number(self.path) + 1).exists()
        if self.lost:
            raise LeaseLost(f"{self.path}: taken over by another worker")

    def _keep(self) -> None:
        while not self._stop.wait(self.seconds / SIGNS):
            try:
                self.confirm()
                os.utime(self.path)
            except LeaseLost:
                # Not SIGINT, which a job in the background ignores.
                _thread.interrupt_main(signal.SIGTERM)
                return
            except OSError as error:
                logger.warning("%s: no sign of life could be given (%s)", self.path, error)


def take(folder: Path, seconds: float = LEASE_SECONDS) -> Lease | None:
    """The lease on the cell in `folder`; None where another worker has it.

    Args:
        seconds: the time limit, the same for all workers.
    """
    leases = folder / LEASES_FOLDER
    leases.mkdir(parents=True, exist_ok=True)
    newest = _newest(leases)
    if newest is not None and _read_owner(newest, seconds) is not None:
        return None
    path = _path(leases, 0 if newest is None else _number(newest) + 1)
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return None
    owner = {"host": socket.gethostname(), "machine": _machine(), "pid": os.getpid(), "taken": _now()}
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(json.dumps(owner) + "\n")
    return Lease(path, seconds)


def owner_of(folder: Path, seconds: float = LEASE_SECONDS) -> dict[str, Any] | None:
    """Who runs the cell in `folder`: `host`, `pid`, `taken`, …, {} of one who has just begun; None if nobody."""
    newest = _newest(folder / LEASES_FOLDER)
    return None if newest is None else _read_owner(newest, seconds)


def _read_owner(path: Path, seconds: float) -> dict[str, Any] | None:
    # Opened anew: NFS then asks the server for content and time.
    with path.open(encoding="utf-8") as file:
        text, modified = file.read(), os.fstat(file.fileno()).st_mtime
    # Empty until its owner has written it; of what is damaged the time limit decides too.
    try:
        owner = json.loads(text) if text.endswith("\n") else {}
    except ValueError:
        owner = {}
    if "released" in owner or _is_gone(owner):
        return None
    return None if _clock(path.parent) - modified > seconds else owner


def _is_gone(owner: dict[str, Any]) -> bool:
    """Whether the owner was a process of this machine that has ended.

    Where another process has its number by now, the time limit applies.
    """
    if owner.get("machine") != _machine():
        return False
    try:
        return psutil.Process(owner["pid"]).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@cache
def _machine() -> list[str]:
    """What tells machines, and containers with process numbers of their own, apart: host names may be the same."""
    name = [socket.gethostname()]
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    if boot.exists():
        name += [boot.read_text(encoding="ascii").strip(), os.readlink(namespace)]
    return name


def _clock(folder: Path) -> float:
    """What the file system's clock says now; this machine's, for somebody who may only read."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".clock-") as file:
            os.utime(file.fileno())
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return time.time()


def _newest(leases: Path) -> Path | None:
    return max(leases.glob("[0-9]*.json"), key=_number, default=None)


def _path(leases: Path, number: int) -> Path:
    return leases / f"{number}.json"


def _number(path: Path) -> int:
    return int(path.stem)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
