"""A note that Antenna answered at an address: it was right once, and is no wrong setting when it fails later."""

from __future__ import annotations

import hashlib
from pathlib import Path

from adc_worker.log import get_logger

_log = get_logger(__name__)

FILE_NAME = "adc_antenna_known"


class KnownAntenna:
    """Whether Antenna ever answered a worker of this data folder at this address. The note holds only a hash of it."""

    def __init__(self, folder: Path, base_url: str) -> None:
        self._path = folder / FILE_NAME
        self._note = hashlib.sha256(base_url.encode()).hexdigest()
        self._is_noted = False

    def is_known(self) -> bool:
        if self._is_noted:
            return True
        try:
            return self._path.read_text() == self._note
        except FileNotFoundError:
            return False
        except (OSError, UnicodeDecodeError) as error:
            _log.warning("antenna_note_unreadable", path=str(self._path), error=str(error))
            return True  # there is one: this is not the first start

    def note(self) -> None:
        """Keep that Antenna answered; without a disk that takes it, for this process only."""
        if self.is_known():
            self._is_noted = True
            return
        self._is_noted = True
        try:
            self._path.write_text(self._note)
        except OSError as error:
            _log.warning("antenna_note_not_kept", path=str(self._path), error=str(error))
