"""What the command line asks of a worker; travels from the parent to its children as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from adc_worker.log import LogFormat


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """The options of `ami worker run`."""

    pipelines: tuple[str, ...] = ()
    project: int | None = None
    exit_when_idle: bool = False
    env_file: str | None = None
    log_format: LogFormat = "json"

    @property
    def env_path(self) -> Path | None:
        return Path(self.env_file) if self.env_file else None

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> WorkerOptions:
        fields = json.loads(text)
        return cls(**{**fields, "pipelines": tuple(fields["pipelines"])})
