"""Every AMI_ variable, with its unit, bounds and one sentence; the only reader of the environment.

An operator sets a URL and a token. The ingest variables of today's worker are ceilings in `auto` mode.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import SplitResult, urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    Field,
    IPvAnyNetwork,
    SecretStr,
    ValidationError,
)
from pydantic_settings import BaseSettings, DotEnvSettingsSource, EnvSettingsSource, NoDecode, SettingsConfigDict

from adc_worker.errors import ConfigurationError, ExitCode, WorkerFault, os_error_may_pass
from adc_worker.redaction import redact

ENV_PREFIX = "AMI_"
Effect = Literal["required", "sets", "limits", "none"]
LogFormat = Literal["console", "color", "json"]


def _split_commas(value: Any) -> Any:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def _has_host(parts: SplitResult) -> bool:
    try:
        return bool((parts.hostname or "").encode("idna").decode("idna")) and parts.port != 0
    except UnicodeError:  # no resolver takes it, and HTTP libraries raise that
        return False


def _http_url(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in {"http", "https"} or not _has_host(parts) or "@" in parts.netloc:
        raise ValueError("must be an http:// or https:// URL such as https://antenna.example.org/api/v2")
    return value.rstrip("/")


def _nats_url(value: SecretStr) -> SecretStr:
    parts = urlsplit(value.get_secret_value())
    if parts.scheme not in {"nats", "tls"} or not _has_host(parts):
        raise ValueError("must be a nats:// or tls:// URL such as nats://nats.example.org:4222")
    return value


def _address(text: str) -> tuple[str, int]:
    parts = urlsplit(f"//{'127.0.0.1:' if text.isdecimal() else ''}{text}")
    if not parts.hostname or parts.port is None:  # asking for a port above 65535 raises ValueError, too
        raise ValueError("must be a port, or an address and a port such as 0.0.0.0:9100")
    return parts.hostname, parts.port


def _status_port(value: str) -> str:
    _address(value)
    return value


Folder = Annotated[Path, AfterValidator(Path.expanduser)]  # no shell has read .env
Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_commas)]
Networks = Annotated[tuple[IPvAnyNetwork, ...], NoDecode, BeforeValidator(_split_commas)]


def _setting(default: Any, sentence: str, effect: Effect = "sets", **bounds: Any) -> Any:
    return Field(default, description=sentence, json_schema_extra={"effect": effect}, **bounds)


def _default_user_data_path() -> Path:
    base = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(base).expanduser() / "adc-worker"


class Settings(BaseSettings):
    """The validated settings of one process; immutable, secrets masked in its repr."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_file_encoding="utf-8", env_ignore_empty=True, extra="ignore", frozen=True
    )

    antenna_api_base_url: Annotated[str, AfterValidator(_http_url)] = _setting(
        "http://localhost:8000/api/v2", "Antenna's API, with its version.", "required"
    )
    antenna_api_auth_token: SecretStr = _setting(
        SecretStr(""), "The token of this worker's user in Antenna.", "required"
    )
    antenna_api_auth_token_file: SecretStr | None = _setting(  # a path, but somebody may put the token itself there
        None, "A file that holds the token, for container secrets."
    )
    antenna_service_name: str = _setting(
        "AMI Data Companion",
        "Name that `ami worker register` gives this service; {hostname} stands for the host's.",
    )
    antenna_idle_sleep_seconds: float = _setting(
        5.0,
        "Seconds between polls while there is no work; after minutes without, up to six times as long.",
        ge=0.1,
        le=60,
    )
    antenna_max_pending_posts: int = _setting(5, "Result posts under way at once.", ge=1, le=64)
    antenna_max_post_bytes: ByteSize = _setting(ByteSize(8_000_000), "Bytes of the largest result post.", ge=10_000)
    antenna_ack_wait_seconds: float = _setting(
        300.0, "Seconds Antenna waits for a result before it delivers the task again.", ge=1
    )
    antenna_max_deliver: int = _setting(2, "Deliveries Antenna gives a task.", ge=1)
    antenna_job_slice_seconds: float = _setting(
        120.0, "Longest stretch on one job while others wait, in seconds.", ge=1
    )
    antenna_nats_url: Annotated[SecretStr, AfterValidator(_nats_url)] | None = _setting(  # it may carry a password
        None, "NATS, where it can be reached, to extend leases and hand tasks back."
    )

    user_data_path: Folder = _setting(
        _default_user_data_path(), "Folder of the journal, staged images and model weights."
    )
    database_url: str | None = _setting(
        None,
        "Relocates the journal when it is a sqlite:/// URL; any other value has no effect.",
        repr=False,  # today's holds a password
    )
    staging_path: Folder | None = _setting(None, "Folder for compressed images; by default under AMI_USER_DATA_PATH.")
    staging_max_bytes: ByteSize | None = _setting(
        None, "Bytes of compressed images kept on disk; computed by default.", "limits", ge=1_000_000
    )

    memory_soft_cap: float = _setting(0.7, "Share of the memory limit the worker plans with.", "limits", gt=0, le=0.95)
    memory_limit_bytes: ByteSize | None = _setting(
        None, "A memory limit in bytes below what the host gives.", "limits", ge=100_000_000
    )
    image_max_bytes: ByteSize = _setting(
        ByteSize(256_000_000), "Bytes of the largest compressed image accepted.", "limits", ge=1000
    )
    image_max_pixels: int = _setting(400_000_000, "Pixels of the largest image accepted.", "limits", ge=1)

    ingest_mode: Literal["auto", "fixed"] = _setting(
        "auto", "auto computes a plan per job; fixed takes the ingest variables, or their old defaults, as they are.",
    )  # fmt: skip
    antenna_api_batch_size: int | None = _setting(
        None, "Ceiling on tasks per fetch; in fixed mode also images per batch.", "limits", ge=1
    )
    antenna_api_dataloader_prefetch_factor: int | None = _setting(
        None, "Ceiling on batches decoded ahead.", "limits", ge=1
    )
    antenna_api_dataloader_pin_memory: bool | None = _setting(
        None, "false forbids pinned memory, true permits it.", "limits"
    )
    antenna_api_dataloader_download_threads: int | None = _setting(
        None, "Ceiling on downloads at once.", "limits", ge=1
    )
    antenna_api_dataloader_num_workers: int | None = _setting(None, "Ceiling on decode workers.", "limits", ge=1)
    num_workers: int | None = _setting(
        None, "Decode workers in fixed mode (default 4); reported and not used in auto mode.", "limits", ge=0
    )

    localization_batch_size: int = _setting(8, "Images per detector call, as a ceiling.", "limits", ge=1)
    classification_batch_size: int = _setting(20, "Crops per classifier call, as a ceiling.", "limits", ge=1)
    extra_pipelines: Names = _setting(
        (), "Functions that return more pipelines, as package.module:function, comma-separated."
    )
    simulated_seconds_per_image: float = _setting(0.04, "The simulated pipeline's inference time in seconds.", ge=0)

    worker_instances: int | None = _setting(None, "Worker processes; by default one per GPU.", ge=1, le=64)
    worker_max_jobs: int | None = _setting(
        None, "Jobs after which a worker process is replaced by a fresh one; off by default.", ge=1
    )
    worker_max_rss_mb: int | None = _setting(
        None, "Anonymous memory in MB at which, between jobs, it is replaced; off by default.", ge=1
    )
    shutdown_grace_seconds: float = _setting(60.0, "Seconds to finish what is in hand after a signal.", ge=0)
    image_allowed_networks: Networks = _setting(
        (), "Private networks images may come from, comma-separated CIDR; not needed where Antenna is private, too."
    )
    image_allowed_hosts: Names = _setting((), "Host names images may come from at private addresses, comma-separated.")
    log_format: Literal["console", "json"] | None = _setting(None, "console or json; by default by terminal.")
    log_level: Literal["debug", "info", "warning", "error"] = _setting("info", "Least severe log line written.")
    status_port: Annotated[str, AfterValidator(_status_port)] | None = _setting(
        None, "Port of the status page and metrics on 127.0.0.1; host:port or [::1]:port listens elsewhere."
    )

    # Of today's worker; accepted with any value so that its .env starts this one.
    image_base_path: Any = _setting(None, "Folder of local image workflows.", "none")
    localization_model: Any = _setting(None, "Antenna's job names the pipeline.", "none")
    binary_classification_model: Any = _setting(None, "Antenna's job names the pipeline.", "none")
    species_classification_model: Any = _setting(None, "Antenna's job names the pipeline.", "none")
    feature_extractor: Any = _setting(None, "Antenna's job names the pipeline.", "none")
    classification_threshold: Any = _setting(None, "Antenna stores every score.", "none")

    @property
    def status_address(self) -> tuple[str, int] | None:
        """Host and port of the status page; None where it is off."""
        return _address(self.status_port) if self.status_port is not None else None

    def log_format_on(self, *, terminal: bool) -> LogFormat:
        """How log lines are written; https://no-color.org wins over a terminal."""
        if self.log_format == "json" or (self.log_format is None and not terminal):
            return "json"
        return "color" if terminal and not os.environ.get("NO_COLOR") else "console"

    @property
    def token(self) -> str:
        """Antenna's token, from the variable or the file it names; raises ConfigurationError if there is none."""
        name, file = "AMI_ANTENNA_API_AUTH_TOKEN", self.antenna_api_auth_token_file
        token = self.antenna_api_auth_token.get_secret_value().strip()
        if file is not None:
            name = f"{name}_FILE"
            try:
                path = Path(file.get_secret_value()).expanduser()
                token = path.read_text(encoding="utf-8", errors="replace").strip()
            except OSError as error:
                if os_error_may_pass(error):  # no errors that name the file: it may be the token by mistake
                    problem = f"{name}: the file it names cannot be read now: {error.strerror}"
                    raise WorkerFault(problem, ExitCode.MACHINE_FAULT) from None
                problem = f"{name}: cannot read the file it names: {error.strerror}; it takes a path, not the token"
                raise ConfigurationError(problem) from None
            if not token:
                raise ConfigurationError(f"{name}: the file it names is empty")
        if not token:
            where = "the page of the worker's user in Antenna"
            raise ConfigurationError(f"{name} is not set: copy it from {where} into .env")
        if not token.isascii() or not token.isprintable() or " " in token:  # HTTP libraries quote it in their error
            raise ConfigurationError(f"{name} has characters that no token has: copy it again from Antenna")
        return token

    @property
    def journal_path(self) -> Path:
        """The SQLite file: AMI_DATABASE_URL where that is a sqlite URL, else under AMI_USER_DATA_PATH."""
        url = self.database_url or ""
        if url.startswith("sqlite:///"):
            return Path(url.removeprefix("sqlite:///"))
        return self.user_data_path / "adc_journal.db"

    @property
    def models_path(self) -> Path:
        return self.user_data_path / "models"

    @property
    def effective_staging_path(self) -> Path:
        return self.staging_path or self.user_data_path / "staging"


class WorkerOptions(BaseModel, frozen=True):
    """What the command line asks of a worker; travels from the parent to its children as JSON."""

    pipelines: tuple[str, ...] = ()
    project: int | None = None
    exit_when_idle: bool = False
    env_file: Path | None = None
    log_format: LogFormat = "json"


def variable(field_name: str) -> str:
    """Return the environment name of a field."""
    return f"{ENV_PREFIX}{field_name}".upper()


def effect_of(name: str) -> str:
    """Return what a field's variable does to a worker."""
    extra = Settings.model_fields[name].json_schema_extra
    return str(extra["effect"]) if isinstance(extra, dict) else ""


def load(env_file: Path | None = None) -> Settings:
    """Read the environment, then `env_file`, then ./.env; raises ConfigurationError naming the variable."""
    if env_file is not None and not env_file.is_file():
        raise ConfigurationError(f"--env-file: {env_file} does not exist")
    try:
        # The last file wins over those before it; the environment wins over all files.
        return Settings(_env_file=_env_files(env_file))
    except ValidationError as error:
        first = error.errors()[0]
        name = variable(str(first["loc"][0])) if first["loc"] else "settings"
        shown = "" if {"TOKEN", "NATS"} & {*name.split("_")} else redact(f" (got {first['input']!r})")
        raise ConfigurationError(f"{name}: {first['msg']}{shown}") from None
    except (OSError, UnicodeError) as error:
        read = " or ".join(str(file) for file in _env_files(env_file) if file.exists())
        if isinstance(error, OSError) and os_error_may_pass(error):
            raise WorkerFault(f"{read} cannot be read now: {error}", ExitCode.MACHINE_FAULT) from None
        raise ConfigurationError(f"{read} cannot be read: {error}") from None


def _env_files(env_file: Path | None) -> tuple[Path, ...]:
    return (Path(".env"),) if env_file is None else (Path(".env"), env_file)


def warnings_for(settings: Settings, env_file: Path | None = None) -> list[str]:
    """One sentence for each variable that is set and unknown, or that has no effect on a worker."""
    names = {variable(name): name for name in Settings.model_fields}
    sentences = []
    for name in sorted(_names_set(env_file)):
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
            hint = f"; did you mean {close[0]}?" if close else ""
            sentences.append(f"{name} is not a setting of this worker{hint}")
            continue
        if effect_of(names[name]) == "none":
            sentences.append(f"{name} has no effect on a worker")
        elif name == "AMI_NUM_WORKERS" and settings.ingest_mode == "auto":
            sentences.append("AMI_NUM_WORKERS is not used in auto mode: decode workers are computed")
        elif name == "AMI_DATABASE_URL" and not str(settings.database_url).startswith("sqlite:///"):
            sentences.append("AMI_DATABASE_URL has no effect on a worker unless it is a sqlite:/// URL")
    return sentences


def limits_set(settings: Settings) -> dict[str, Any]:
    """Return the ingest ceilings that are set, by variable name."""
    return {
        variable(name): getattr(settings, name)
        for name in Settings.model_fields
        if effect_of(name) == "limits" and name in settings.model_fields_set
    }


def _names_set(env_file: Path | None) -> set[str]:
    sources: Sequence[EnvSettingsSource] = (
        EnvSettingsSource(Settings),
        DotEnvSettingsSource(Settings, env_file=_env_files(env_file)),
    )
    return {name.upper() for source in sources for name in source.env_vars if name.upper().startswith(ENV_PREFIX)}


def env_example() -> str:
    """Return the text of .env.example: every variable, only URL and token uncommented."""
    lines = ["# Settings of the worker. The first two are all it needs; everything else is computed.", ""]
    for name, info in Settings.model_fields.items():
        note = {"none": " No effect on a worker.", "limits": " A limit."}.get(effect_of(name), "")
        shown = "~/.local/share/adc-worker" if name == "user_data_path" else str(info.default or "")
        comment = "" if effect_of(name) == "required" else "#"
        lines += [f"# {info.description}{note}", f"{comment}{variable(name)}={shown}"]
    return "\n".join(lines) + "\n"
