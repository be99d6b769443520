"""An operator sets a URL and a token; whatever else is set is honoured, explained, or named in a warning."""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest

from adc_worker import settings
from adc_worker.errors import ConfigurationError
from adc_worker.settings import Settings, load, warnings_for

REPOSITORY = Path(__file__).parents[2]
TOKEN = "0123456789abcdef0123456789abcdef01234567"

# What operators of today's worker have in their .env, in shape.
OLD_ENV = """\
# a comment
AMI_DATABASE_URL=postgresql://someone@db.example.org:5432/traps
AMI_USER_DATA_PATH=./data
AMI_IMAGE_BASE_PATH=/mnt/photographs/
AMI_LOCALIZATION_MODEL="A Detector & More"
AMI_BINARY_CLASSIFICATION_MODEL="Moth / Non-Moth Classifier"
AMI_SPECIES_CLASSIFICATION_MODEL="Somewhere & Elsewhere Species"
AMI_FEATURE_EXTRACTOR="Features of somewhere"
AMI_CLASSIFICATION_THRESHOLD=0.75
AMI_LOCALIZATION_BATCH_SIZE=3
AMI_CLASSIFICATION_BATCH_SIZE=25
AMI_NUM_WORKERS=2
AMI_ANTENNA_API_BASE_URL=http://localhost:8000/api/v2
AMI_ANTENNA_API_AUTH_TOKEN=0123456789abcdef0123456789abcdef01234567
AMI_ANTENNA_API_BATCH_SIZE=6
AMI_ANTENNA_SERVICE_NAME="Traps of the valley"
"""


def write(name: str, text: str) -> Path:
    path = Path(name)
    path.write_text(text, encoding="utf-8")
    return path


def test_the_environment_wins_over_the_env_file_and_that_over_dot_env(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of three settings is decided by another source."""
    write(".env", "AMI_LOG_LEVEL=debug\nAMI_IMAGE_MAX_PIXELS=1\nAMI_ANTENNA_MAX_DELIVER=1\n")
    env_file = write("other.env", "AMI_IMAGE_MAX_PIXELS=2\nAMI_ANTENNA_MAX_DELIVER=2\n")
    monkeypatch.setenv("AMI_ANTENNA_MAX_DELIVER", "3")
    config = load(env_file)
    assert (config.log_level, config.image_max_pixels, config.antenna_max_deliver) == ("debug", 2, 3)


def test_without_any_source_the_defaults_hold() -> None:
    """No .env is needed."""
    config = load()
    assert config.antenna_api_base_url == "http://localhost:8000/api/v2"
    assert config.memory_soft_cap == 0.7
    assert config.ingest_mode == "auto"


def test_an_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compose files pass variables on that have no value."""
    write(".env", "AMI_WORKER_INSTANCES=2\n")
    monkeypatch.setenv("AMI_WORKER_INSTANCES", "")
    monkeypatch.setenv("AMI_ANTENNA_API_BATCH_SIZE", "")
    config = load()
    assert config.worker_instances == 2
    assert config.antenna_api_batch_size is None


def test_an_env_file_that_is_not_there_is_an_error() -> None:
    """A typing error in --env-file does not start a worker with defaults."""
    with pytest.raises(ConfigurationError, match=r"--env-file: nowhere\.env does not exist"):
        load(Path("nowhere.env"))


def test_the_env_file_of_todays_worker_starts_this_one_unchanged() -> None:
    """Values are taken where they mean something here."""
    write(".env", OLD_ENV)
    config = load()
    assert config.token == TOKEN
    assert config.antenna_service_name == "Traps of the valley"
    assert config.user_data_path == Path("data")
    assert (config.localization_batch_size, config.classification_batch_size) == (3, 25)
    assert (config.antenna_api_batch_size, config.num_workers) == (6, 2)


def test_the_env_file_of_todays_worker_is_answered_line_by_line() -> None:
    """Every line without an effect is named, and no other."""
    write(".env", OLD_ENV)
    assert warnings_for(load()) == [
        "AMI_BINARY_CLASSIFICATION_MODEL has no effect on a worker",
        "AMI_CLASSIFICATION_THRESHOLD has no effect on a worker",
        "AMI_DATABASE_URL has no effect on a worker unless it is a sqlite:/// URL",
        "AMI_FEATURE_EXTRACTOR has no effect on a worker",
        "AMI_IMAGE_BASE_PATH has no effect on a worker",
        "AMI_LOCALIZATION_MODEL has no effect on a worker",
        "AMI_NUM_WORKERS is not used in auto mode: decode workers are computed",
        "AMI_SPECIES_CLASSIFICATION_MODEL has no effect on a worker",
    ]


def test_the_limits_of_todays_worker_are_reported_as_such() -> None:
    """The start line names what the operator's file limits."""
    write(".env", OLD_ENV)
    assert settings.limits_set(load()) == {
        "AMI_ANTENNA_API_BATCH_SIZE": 6,
        "AMI_NUM_WORKERS": 2,
        "AMI_LOCALIZATION_BATCH_SIZE": 3,
        "AMI_CLASSIFICATION_BATCH_SIZE": 25,
    }


def test_in_fixed_mode_the_number_of_workers_is_used_without_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only auto mode computes it."""
    monkeypatch.setenv("AMI_NUM_WORKERS", "2")
    monkeypatch.setenv("AMI_INGEST_MODE", "fixed")
    assert warnings_for(load()) == []


def test_a_misspelt_variable_is_named_with_the_nearest_real_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it is set."""
    write(".env", "AMI_ANTENNA_API_BATCHSIZE=4\n")
    env_file = write("other.env", "AMI_MEMORY_SOFTCAP=0.5\n")
    monkeypatch.setenv("AMI_LOG_LEVELL", "debug")
    assert warnings_for(load(env_file), env_file) == [
        "AMI_ANTENNA_API_BATCHSIZE is not a setting of this worker; did you mean AMI_ANTENNA_API_BATCH_SIZE?",
        "AMI_LOG_LEVELL is not a setting of this worker; did you mean AMI_LOG_LEVEL?",
        "AMI_MEMORY_SOFTCAP is not a setting of this worker; did you mean AMI_MEMORY_SOFT_CAP?",
    ]


def test_a_variable_like_no_other_is_named_without_a_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong hint is worse than none."""
    monkeypatch.setenv("AMI_ZZZ", "1")
    assert warnings_for(load()) == ["AMI_ZZZ is not a setting of this worker"]


def test_variables_of_other_programs_are_nobodys_business(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only AMI_ names are ours."""
    monkeypatch.setenv("AMIGA_LOG_LEVEL", "debug")
    write(".env", "OTHER=1\n")
    assert warnings_for(load()) == []


@pytest.mark.parametrize(
    ("value", "address"),
    [("9100", ("127.0.0.1", 9100)), ("0.0.0.0:9100", ("0.0.0.0", 9100)), ("[::1]:0", ("::1", 0))],  # noqa: S104
)
def test_the_status_page_is_for_this_host_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, value: str, address: tuple[str, int]
) -> None:
    """A port alone is loopback."""
    assert load().status_address is None
    monkeypatch.setenv("AMI_STATUS_PORT", value)
    assert load().status_address == address


@pytest.mark.parametrize("value", ["99999", "on", "0.0.0.0", "host:", "-1"])  # noqa: S104
def test_a_status_port_that_is_none_is_an_error(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("AMI_STATUS_PORT", value)
    with pytest.raises(ConfigurationError, match="AMI_STATUS_PORT"):
        load()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AMI_MEMORY_SOFT_CAP", "7"),
        ("AMI_MEMORY_LIMIT_BYTES", "12"),
        ("AMI_INGEST_MODE", "manual"),
        ("AMI_ANTENNA_API_BATCH_SIZE", "0"),
        ("AMI_ANTENNA_API_DATALOADER_PIN_MEMORY", "perhaps"),
        ("AMI_ANTENNA_API_BASE_URL", "antenna.example.org/api/v2"),
        ("AMI_ANTENNA_API_BASE_URL", "ftp://antenna.example.org"),
        ("AMI_ANTENNA_API_BASE_URL", "http://antenna..org/api/v2"),
        ("AMI_ANTENNA_API_BASE_URL", "http://xn--/api/v2"),
        ("AMI_LOG_LEVEL", "chatty"),
    ],
)
def test_a_bad_value_is_shown_with_the_name_of_its_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """The operator sees at once which line to correct."""
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=f"^{name}: .*got '{value}'"):
        load()


@pytest.mark.parametrize("value", ["nats://nats:port", "nats://nats:99999", "nats://nats..org:4222", "nats://[::1"])
def test_a_nats_url_that_leads_nowhere_is_named(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """At start, and not where it is first used."""
    monkeypatch.setenv("AMI_ANTENNA_NATS_URL", value)
    with pytest.raises(ConfigurationError, match=r"^AMI_ANTENNA_NATS_URL: "):
        load()


def test_an_env_file_that_is_no_text_is_named() -> None:
    """Editors of old machines write Latin-1."""
    Path(".env").write_bytes("AMI_ANTENNA_SERVICE_NAME=K\u00e4fer\n".encode("latin-1"))
    with pytest.raises(ConfigurationError, match=r"^\.env cannot be read: 'utf-8' codec"):
        load()


def test_a_bad_value_brings_no_token_into_the_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start-up errors end in tickets, with all that caused them."""
    monkeypatch.setenv("AMI_ANTENNA_API_AUTH_TOKEN", TOKEN)
    monkeypatch.setenv("AMI_LOG_LEVEL", "chatty")
    with pytest.raises(ConfigurationError) as caught:
        load()
    assert TOKEN not in "".join(traceback.format_exception(caught.value))
    assert "ValidationError" not in "".join(traceback.format_exception(caught.value))


def test_the_token_is_masked_wherever_settings_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """In repr, in str, and in the field itself."""
    monkeypatch.setenv("AMI_ANTENNA_API_AUTH_TOKEN", TOKEN)
    config = load()
    assert TOKEN not in f"{config!r} {config} {config.antenna_api_auth_token}"
    assert config.token == TOKEN


def test_a_missing_token_says_which_variable_to_set() -> None:
    """Spaces are no token."""
    write(".env", "AMI_ANTENNA_API_AUTH_TOKEN='  '\n")
    with pytest.raises(ConfigurationError, match="AMI_ANTENNA_API_AUTH_TOKEN is not set: copy it from"):
        _ = load().token


def test_the_token_may_come_from_a_file_which_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Secrets end in a line feed more often than not."""
    monkeypatch.setenv("AMI_ANTENNA_API_AUTH_TOKEN", "other")
    monkeypatch.setenv("AMI_ANTENNA_API_AUTH_TOKEN_FILE", str(write("secret", f"{TOKEN}\n")))
    assert load().token == TOKEN


def test_a_token_where_its_files_name_belongs_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in the error, which has the reason, nor in what caused it, nor with the settings."""
    monkeypatch.setenv("AMI_ANTENNA_API_AUTH_TOKEN_FILE", TOKEN)
    config = load()
    with pytest.raises(ConfigurationError, match=r"TOKEN_FILE: cannot read .*: No such file .*not the token") as caught:
        _ = config.token
    assert TOKEN not in f"{config!r} {config} {dict(config)} {''.join(traceback.format_exception(caught.value))}"


def test_an_empty_token_file_is_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker without a token would be refused at every fetch."""
    monkeypatch.setenv("AMI_ANTENNA_API_AUTH_TOKEN_FILE", str(write("secret", "\n")))
    with pytest.raises(ConfigurationError, match="TOKEN_FILE: the file it names is empty"):
        _ = load().token


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("sqlite:////srv/ami/journal.db", Path("/srv/ami/journal.db")),
        ("sqlite:///journal.db", Path("journal.db")),
        ("postgresql://db/ami", Path("/data/adc_journal.db")),
        ("", Path("/data/adc_journal.db")),
    ],
)
def test_a_sqlite_url_moves_the_journal_and_no_other_does(
    monkeypatch: pytest.MonkeyPatch, url: str, path: Path
) -> None:
    """AMI_DATABASE_URL of today's worker may name a server."""
    monkeypatch.setenv("AMI_USER_DATA_PATH", "/data")
    monkeypatch.setenv("AMI_DATABASE_URL", url)
    assert load().journal_path == path


def test_a_sqlite_url_is_no_reason_for_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has its effect."""
    monkeypatch.setenv("AMI_DATABASE_URL", "sqlite:////srv/journal.db")
    assert warnings_for(load()) == []


def test_images_are_staged_under_the_data_folder_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """One variable moves everything."""
    monkeypatch.setenv("AMI_USER_DATA_PATH", "/data")
    assert load().effective_staging_path == Path("/data/staging")
    monkeypatch.setenv("AMI_STAGING_PATH", "/scratch")
    assert load().effective_staging_path == Path("/scratch")


def test_the_home_folder_is_known_in_files_that_no_shell_reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`.env.example` itself shows a path with a tilde."""
    write(".env", "AMI_USER_DATA_PATH=~/a\nAMI_STAGING_PATH=~/b\nAMI_ANTENNA_API_AUTH_TOKEN_FILE=~/c\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c").write_text(TOKEN)
    config = load()
    assert config.user_data_path == tmp_path / "a"
    assert config.staging_path == tmp_path / "b"
    assert config.token == TOKEN


def test_lists_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spaces and a last comma do no harm."""
    monkeypatch.setenv("AMI_EXTRA_PIPELINES", "traps.models:pipelines, other:make ,")
    monkeypatch.setenv("AMI_IMAGE_ALLOWED_HOSTS", "10.0.0.1")
    config = load()
    assert config.extra_pipelines == ("traps.models:pipelines", "other:make")
    assert config.image_allowed_hosts == ("10.0.0.1",)
    assert config.image_allowed_networks == ()


def test_sizes_may_have_a_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers of bytes are hard to read."""
    monkeypatch.setenv("AMI_MEMORY_LIMIT_BYTES", "4GiB")
    assert load().memory_limit_bytes == 4 * 1024**3


def test_the_url_loses_its_last_slash(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths begin with one."""
    monkeypatch.setenv("AMI_ANTENNA_API_BASE_URL", "https://antenna.example.org/api/v2/")
    assert load().antenna_api_base_url == "https://antenna.example.org/api/v2"


def test_settings_cannot_be_changed() -> None:
    """Threads share them."""
    with pytest.raises(ValueError, match="frozen"):
        load().log_level = "debug"  # type: ignore[misc]


def test_env_example_is_what_the_settings_say() -> None:
    """After a change: `ami settings --env-example > .env.example`."""
    assert (REPOSITORY / ".env.example").read_text(encoding="utf-8") == settings.env_example()


def test_env_example_asks_for_url_and_token_alone() -> None:
    """Every other line is a comment, and every variable has one."""
    lines = settings.env_example().splitlines()
    assert [line for line in lines if line and not line.startswith("#")] == [
        "AMI_ANTENNA_API_BASE_URL=http://localhost:8000/api/v2",
        "AMI_ANTENNA_API_AUTH_TOKEN=",
    ]
    named = {line.lstrip("#").partition("=")[0] for line in lines if line.lstrip("#").startswith("AMI_")}
    assert named == {settings.variable(name) for name in Settings.model_fields}


def test_env_example_with_every_line_in_force_changes_nothing() -> None:
    """What it shows as defaults are the defaults; only the data folder is a matter of XDG_DATA_HOME."""
    lines = [line.removeprefix("#") for line in settings.env_example().splitlines() if "=" in line]
    uncommented = load(write("all.env", "\n".join(line for line in lines if line.startswith("AMI_")) + "\n"))
    assert uncommented.model_dump(exclude={"user_data_path"}) == load().model_dump(exclude={"user_data_path"})
    assert uncommented.user_data_path == Path.home() / ".local/share/adc-worker"


@pytest.mark.parametrize("token", ["two words", "line\nbreak", "caf\u00e9", "nul\x00"])
def test_a_token_that_fits_into_no_header_is_named_and_not_shown(monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    """HTTP libraries would quote it in their error."""
    monkeypatch.setenv("AMI_ANTENNA_API_AUTH_TOKEN_FILE", str(write("secret", token)))
    with pytest.raises(ConfigurationError, match="TOKEN_FILE has characters that no token has") as caught:
        _ = settings.load().token
    assert token not in str(caught.value)


def test_passwords_in_urls_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Today's .env has one for its database."""
    monkeypatch.setenv("AMI_DATABASE_URL", "postgresql://ami:canary@db:5432/ami")
    monkeypatch.setenv("AMI_ANTENNA_NATS_URL", "nats://canary@nats:4222")
    assert "canary" not in repr(settings.load())
    monkeypatch.setenv("AMI_ANTENNA_API_BASE_URL", "https://ami:canary@antenna.example.org/api/v2")
    with pytest.raises(ConfigurationError, match=r"AMI_ANTENNA_API_BASE_URL: .*must be an http") as caught:
        settings.load()
    assert "canary" not in str(caught.value)


def test_private_networks_are_read_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A single address is a network of one; what is none is refused at start."""
    monkeypatch.setenv("AMI_IMAGE_ALLOWED_NETWORKS", "10.0.0.0/8, 192.168.1.7,fd00::/8")
    assert [str(each) for each in settings.load().image_allowed_networks] == [
        "10.0.0.0/8",
        "192.168.1.7/32",
        "fd00::/8",
    ]
    monkeypatch.setenv("AMI_IMAGE_ALLOWED_NETWORKS", "minio")
    with pytest.raises(ConfigurationError, match="AMI_IMAGE_ALLOWED_NETWORKS"):
        settings.load()
