"""The Unix socket through which processes tell a worker's parent, and `ami worker status` asks it.

It lies in the data folder and is readable by its user alone. The status at the end of the last job
is also written to a file there, so that `ami worker report` works when the worker has ended.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from adc_worker.errors import ConfigurationError, ExitCode, WorkerFault, os_error_may_pass
from adc_worker.log import get_logger
from adc_worker.status.hub import StatusHub
from adc_worker.status.paths import report_path, socket_address, socket_path
from adc_worker.status.snapshot import Snapshot
from adc_worker.status.worker_status import WorkerStatus

_log = get_logger(__name__)

ASK = b"status\n"
ANSWER_TIMEOUT_S = 5.0  # chosen: an answer takes milliseconds
BLOCK_BYTES = 1 << 16


@contextmanager
def listening(hub: StatusHub, folder: Path) -> Iterator[None]:
    """Take snapshots and answer who asks, over a socket in `folder`, while the body runs."""
    path = socket_path(folder, os.getpid())
    server = _bind(path)
    thread = threading.Thread(
        target=_accept,
        args=(server, hub, folder),
        name="status",
        daemon=True,
    )
    thread.start()
    try:
        yield
    finally:
        with suppress(OSError):  # on some systems it is an error that nobody is connected
            server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join()
        path.unlink(missing_ok=True)


def _bind(path: Path) -> socket.socket:
    server = socket.socket(socket.AF_UNIX)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        with socket_address(path) as address:
            server.bind(address)
        path.chmod(0o600)
    except OSError as error:
        server.close()
        problem = f"AMI_USER_DATA_PATH: cannot create {path}: {error.strerror}"
        if os_error_may_pass(error):
            raise WorkerFault(problem, ExitCode.MACHINE_FAULT) from error
        raise ConfigurationError(problem) from error
    server.listen()
    return server


def _accept(server: socket.socket, hub: StatusHub, folder: Path) -> None:
    while True:
        try:
            connection, _ = server.accept()
        except OSError:
            return  # the socket was closed: the worker ends
        reader = threading.Thread(
            target=_serve,
            args=(connection, hub, folder),
            name="status-reader",
            daemon=True,
        )
        reader.start()


def _serve(connection: socket.socket, hub: StatusHub, folder: Path) -> None:
    """Read lines, each a snapshot or the question of somebody who may not wait for the answer."""
    with connection, connection.makefile("rb") as lines, suppress(OSError):
        for line in lines:
            if line == ASK:
                connection.sendall(hub.status().to_json())
                return
            if not line.endswith(b"\n"):
                return  # the process died while it was writing
            a_job_ended = hub.add(Snapshot.from_json(line))
            if a_job_ended:
                _keep_report(hub, folder)


def _keep_report(hub: StatusHub, folder: Path) -> None:
    # Jobs of two processes may end at once: each thread writes a file of its own.
    partial = folder / f".last-job.{os.getpid()}.{threading.get_ident()}"
    try:
        partial.touch(mode=0o600)
        partial.write_bytes(hub.status().to_json())
        partial.replace(report_path(folder))
    except OSError as error:  # a full disk: the process goes on telling
        _log.warning("report_not_kept", error=str(error))


def running(folder: Path, answer_timeout_s: float = ANSWER_TIMEOUT_S) -> list[WorkerStatus]:
    """Ask every worker of this host that keeps its data in `folder`.

    Raises:
        WorkerFault: one of them does not answer.
    """
    pattern = socket_path(folder, "*").name
    found = []
    for path in sorted(folder.glob(pattern)):
        answer = _ask(path, answer_timeout_s)
        if answer is None:
            path.unlink(missing_ok=True)  # its worker was killed
        else:
            found.append(WorkerStatus.from_json(answer))
    return found


def _ask(path: Path, timeout_s: float) -> bytes | None:
    """Return a worker's answer; None where nobody listens any more."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(timeout_s)
        try:
            with socket_address(path) as address:
                connection.connect(address)
        except ConnectionRefusedError:
            return None
        answer = bytearray()
        try:
            connection.sendall(ASK)
            while block := connection.recv(BLOCK_BYTES):
                answer += block
        except OSError as error:
            problem = f"the worker that listens at {path} does not answer: {error}"
            raise WorkerFault(problem) from error
    return bytes(answer)
