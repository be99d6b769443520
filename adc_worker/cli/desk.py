"""What `ami devserver` and `ami demo` share: an Antenna of the desk while a command runs."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from adc_worker.desk.server import DevServer

PIPELINE = "light_sheet_blobs"
LOOK_S = 0.1  # chosen: how often a command looks whether it is to stop
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp"})


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM while the body runs.

    As exceptions they would come at any moment, also while a process is being started.
    """
    stops: list[int] = []
    before = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, lambda number, _frame: stops.append(number))
    try:
        yield stops
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def desk_server(**options: Any) -> Iterator[DevServer]:
    """Run a DevServer while the body runs; what keeps it from starting is said in one line."""
    with ExitStack() as stack:
        try:  # not at the top: `ami --help` must work without the `desk` extra
            from adc_worker.desk.server import DevServer  # noqa: PLC0415

            server = stack.enter_context(DevServer(**options))
        except ImportError as error:
            raise click.ClickException(f"{error}: run `pip install 'adc-worker[desk]'`") from error
        except (OSError, RuntimeError) as error:  # the port is taken, or nats-server does not start
            raise click.ClickException(str(error)) from error
        yield server


def images_in(folder: Path) -> list[Path]:
    files = [file for file in folder.resolve().iterdir() if file.suffix.lower() in _IMAGE_SUFFIXES]
    if not files:
        raise click.ClickException(f"{folder} has no images ({', '.join(sorted(_IMAGE_SUFFIXES))})")
    return sorted(files)
