"""A decode process: maps the arena, decodes what it is told to, and ends when its owner is gone. Imports no torch.

Messages are JSON over a SEQPACKET socket; the arena's memfd travels beside the message that announces it. An answer
repeats the `ticket` of its request: number, arena, place in it and file, so that it can be taken for no other's.
"""

from __future__ import annotations

import faulthandler
import json
import mmap
import os
import select
import signal
import socket
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from adc_worker.errors import ImageError, ImageTooLarge
from adc_worker.ingest.decode import decode
from adc_worker.ingest.header import ImageHeader

MESSAGE_BYTES = 1 << 16


def serve(connection: socket.socket) -> None:
    """Answer one message after the other until the other end closes."""
    threading.Thread(target=_end_with_owner, args=(connection.fileno(),), daemon=True).start()
    arena = mmap.mmap(-1, mmap.PAGESIZE)
    generation = None
    while True:
        message, descriptors, _flags, _address = socket.recv_fds(connection, MESSAGE_BYTES, 1)
        if not message:
            return
        task = json.loads(message)
        if "arena_bytes" in task:
            arena = mmap.mmap(descriptors[0], task["arena_bytes"])
            generation = task["generation"]
            os.close(descriptors[0])  # the mapping holds the memory
        elif task["ticket"]["generation"] != generation:
            raise RuntimeError(f"asked to decode into arena {task['ticket']['generation']}, has {generation}")
        else:
            connection.send(json.dumps(_answer(task, arena)).encode())


def _answer(task: dict[str, Any], arena: mmap.mmap) -> dict[str, Any]:
    ticket = task["ticket"]
    header = ImageHeader(**task["header"])
    if header.pixel_bytes > ticket["size_bytes"]:
        raise RuntimeError(f"{header.pixel_bytes} bytes of pixels are to go into {ticket['size_bytes']}")
    out = np.frombuffer(arena, np.uint8, count=header.pixel_bytes, offset=ticket["offset"]).reshape(header.shape)
    try:
        report = decode(Path(ticket["path"]), header, out)
    except ImageError as error:
        return {"ticket": ticket, "error": str(error), "too_large": isinstance(error, ImageTooLarge)}
    return {"ticket": ticket, "report": asdict(report)}


def _end_with_owner(descriptor: int) -> None:
    """Also in the middle of a decode, which may never end."""
    hang_up = select.poll()
    hang_up.register(descriptor, 0)  # that it hung up is reported unasked
    if any(event & select.POLLHUP for _descriptor, event in hang_up.poll()):  # and not our own closing, on an error
        os._exit(0)


def main() -> None:
    faulthandler.enable()
    # Signals of a terminal or a supervisor reach whole groups; the end of the socket is what ends this process.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        serve(connection)


if __name__ == "__main__":
    main()
