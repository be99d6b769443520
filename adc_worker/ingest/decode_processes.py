"""The second decode engine: torch-free processes that map the arena and decode into it.

For images that may crash a decoder, and for jobs whose inference decode threads disturb.
"""

from __future__ import annotations

import errno
import json
import queue
import signal
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from adc_worker.errors import ImageError, ImageTooLarge, ImageUnreadable, WorkerFault
from adc_worker.host.memory import oom_kills
from adc_worker.ingest.arena import Arena, Region
from adc_worker.ingest.decode import DecodeReport, ThreadEngine
from adc_worker.ingest.decode_worker import MESSAGE_BYTES
from adc_worker.ingest.header import ImageHeader
from adc_worker.log import get_logger

_log = get_logger(__name__)

# A death of the process's own making is evidence against the image; a kill from outside is not.
_OWN_DEATHS = frozenset({-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT, -signal.SIGILL, -signal.SIGFPE})
STRIKES = 2  # deaths of its decoder that make an error result of an image
KILLS_MAX = 10  # of one image's decoders by another's hand: then something on this machine is set on it


class DecodeProcess:
    """One decode process and the socket that commands it; it ends when the socket closes."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "adc_worker.ingest.decode_worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self._socket = ours
        self._arena_generation = -1
        self._requests = 0

    @property
    def pid(self) -> int:
        return self._process.pid

    def decode(self, arena: Arena, path: Path, header: ImageHeader, target: Region) -> DecodeReport:
        """Decode in the process. After any exception but ImageError it must be closed: it may still write.

        Raises:
            CalledProcessError: it died.
            ImageError: the image cannot be decoded, with the decoder's words.
            WorkerFault: it answered to something else than what it was asked.
        """
        self._requests += 1
        ticket = {
            "number": self._requests,
            "generation": arena.generation,
            "offset": target.offset,
            "size_bytes": target.size_bytes,
            "path": str(path),
        }
        answer = self._exchange(arena, {"ticket": ticket, "header": asdict(header)})
        if not answer:
            raise subprocess.CalledProcessError(self._process.wait(), "decode process")
        told = json.loads(answer)
        if told["ticket"] != ticket:
            raise WorkerFault(f"a decode process was asked for {ticket} and answered {told['ticket']}")
        if "error" in told:
            raise (ImageTooLarge if told["too_large"] else ImageUnreadable)(told["error"])
        return DecodeReport(**told["report"])

    def _exchange(self, arena: Arena, task: dict[str, Any]) -> bytes:
        """Send a request and wait for the answer; empty when the process is gone."""
        try:
            if self._arena_generation != arena.generation:
                announcement = {"arena_bytes": arena.size_bytes, "generation": arena.generation}
                socket.send_fds(self._socket, [json.dumps(announcement).encode()], [arena.descriptor])
                self._arena_generation = arena.generation
            self._socket.send(json.dumps(task).encode())
            return self._socket.recv(MESSAGE_BYTES)
        except (BrokenPipeError, ConnectionResetError):
            return b""

    def close(self) -> None:
        self._socket.close()
        self._process.kill()  # it holds nothing that a kill could spoil
        self._process.wait()


class ProcessEngine(ThreadEngine):
    """Threads that each have a process decode for them; one more waits, to replace a process that dies at once."""

    def __init__(self, arena: Arena, workers: int, scratch_bytes: int) -> None:
        super().__init__(arena, workers, scratch_bytes)
        self._idle: queue.SimpleQueue[DecodeProcess] = queue.SimpleQueue()
        for _ in range(workers + 1):
            self._idle.put(self._start())

    def close(self) -> None:
        super().close()
        while not self._idle.empty():
            self._idle.get().close()
        self.pids.clear()

    def _start(self) -> DecodeProcess:
        process = DecodeProcess()
        self.pids.append(process.pid)
        return process

    def _replace(self, process: DecodeProcess) -> DecodeProcess:
        """End a process, which may still write into the arena, and start another."""
        process.close()
        self.pids.remove(process.pid)
        return self._start()

    def _decode(self, path: Path, header: ImageHeader, target: Region) -> DecodeReport:
        strikes = kills = 0
        while True:
            process, oom_kills_before = self._idle.get(), oom_kills()
            try:
                return process.decode(self._arena, path, header, target)
            except ImageError:
                raise  # an answer, like a report: the process has done what it was asked
            except subprocess.CalledProcessError as died:
                process = self._replace(process)
                code = died.returncode
                if code >= 0 and not path.exists():
                    raise FileNotFoundError(errno.ENOENT, "the staged file is gone", str(path)) from None
                if code >= 0:  # an exception, told on stderr; as in a decode thread it is ours, not the image's
                    raise WorkerFault(str(died)) from None
                # Beside other decodes, whose memory it was says nothing.
                if code in _OWN_DEATHS or (self.workers == 1 and oom_kills() > oom_kills_before):
                    strikes += 1
                else:
                    kills += 1
                _log.warning("decoder_died", exit_code=code, file=path.name, strikes=strikes, kills=kills)
                if kills == KILLS_MAX:
                    raise WorkerFault(
                        f"decode processes were killed {KILLS_MAX} times at one image, and not for want of memory:"
                        " find out what kills processes on this machine"
                    ) from None
                if strikes == STRIKES:
                    name = signal.Signals(-code).name
                    raise ImageUnreadable(f"decoding it crashed the decoder {STRIKES} times ({name})") from None
            except BaseException:
                process = self._replace(process)
                raise
            finally:
                self._idle.put(process)  # at the end: the one that waited is next
