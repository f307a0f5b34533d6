"""Between a KVManager and the workers of its instance: one unix socket, JSON, no pickle.

The manager listens; each worker connects and is told what its instance is, then gets loads and stores
and says how they ended. A worker that goes away fails what it had.
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing.connection as mpc
import os
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any

Message = dict[str, Any]


def path_of(gpu_register_port: str, dp_client_id: int) -> str:
    """The socket of one client's workers."""
    return f"{gpu_register_port.removeprefix('ipc://')}.{dp_client_id}"


def send(connection: mpc.Connection, message: Message) -> None:
    connection.send_bytes(json.dumps(message).encode())


SEND_SECONDS = 1
"""A peer that does not read for this long is gone."""


def bound(connection: mpc.Connection) -> None:
    """No send on this connection waits longer than SEND_SECONDS."""
    with socket.socket(fileno=os.dup(connection.fileno())) as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_SECONDS, 0))


def hang_up(connection: mpc.Connection) -> None:
    """Ends a connection, also for a thread that is reading from it."""
    try:
        with socket.socket(fileno=os.dup(connection.fileno())) as peer:
            peer.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass


def receive(connection: mpc.Connection) -> Message:
    return json.loads(connection.recv_bytes())


class Hub:
    """The manager's side."""

    def __init__(
        self, path: str, words: Callable[[int], Message], heard: Callable[[int, Message | None], None]
    ) -> None:
        self._path, self._words, self._heard = path, words, heard
        self._lock_file = open(f"{path}.lock", "w")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock_file.close()
            raise ValueError(f"{path}: another KVManager has this dp_client_id; give each instance its own") from None
        if os.path.exists(path):
            os.unlink(path)
        before = os.umask(0o177)
        try:
            self._listener = mpc.Listener(path, "AF_UNIX")
        finally:
            os.umask(before)
        self._workers: dict[int, mpc.Connection] = {}
        self._lock = threading.RLock()
        self._closed = False
        threading.Thread(target=self._accept, name="kvring-hub", daemon=True).start()

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection = self._listener.accept()
            except OSError:
                continue
            threading.Thread(target=self._listen, args=(connection,), name="kvring-worker", daemon=True).start()

    def _listen(self, connection: mpc.Connection) -> None:
        rank = None
        try:
            bound(connection)
            asked = int(receive(connection)["rank"])
            if asked in self.ranks():
                send(connection, {"refused": f"rank {asked} is there already: give each worker its intra_client_id"})
                return
            rank = asked
            send(connection, {"you": self._words(rank)})
            receive(connection)  # its tensors are registered
            with self._lock:
                self._workers[rank] = connection
            while True:
                self._heard(rank, receive(connection))
        except (OSError, EOFError, ValueError, KeyError, TypeError):  # TypeError: closed by another thread
            pass
        finally:
            with self._lock:
                if rank is not None and self._workers.get(rank) is connection:
                    del self._workers[rank]
                    self._heard(rank, None)
            hang_up(connection)
            connection.close()

    def ranks(self) -> set[int]:
        """Workers that are there."""
        with self._lock:
            return set(self._workers)

    def tell(self, message: Message) -> set[int]:
        """Tells every worker. Says which were told."""
        with self._lock:
            workers = dict(self._workers)
        told = set()
        for rank, connection in workers.items():
            try:
                send(connection, message)
                told.add(rank)
            except OSError:
                # It has stopped reading, or is gone: its listener hears that, and what it had fails.
                hang_up(connection)
        return told

    def close(self) -> None:
        self._closed = True
        self._listener.close()
        with self._lock:
            workers = list(self._workers.values())
        for connection in workers:
            hang_up(connection)
        self._lock_file.close()
        if os.path.exists(self._path):
            os.unlink(self._path)
