"""What signs a URL and what opens Antenna appears in no log line, whoever writes it."""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import structlog

from adc_worker import log
from adc_worker.redaction import hide, redact

SIGNED = "https://images.example.org/trap/1.jpg?X-Amz-Signature=5ec2e7&X-Amz-Date=1"
TOKEN = "0123456789abcdef0123456789abcdef01234567"
SECRETS = ("5ec2e7", TOKEN)


@pytest.fixture(autouse=True)
def _logging_is_put_back() -> Iterator[None]:
    """Both logging systems are global; basicConfig(force=True) removes pytest's handlers, too."""
    root = logging.getLogger()
    handlers, level, hooks = root.handlers[:], root.level, (sys.excepthook, threading.excepthook)
    for handler in handlers:
        root.removeHandler(handler)
    yield
    structlog.reset_defaults()
    logging.captureWarnings(capture=False)
    sys.excepthook, threading.excepthook = hooks
    root.handlers[:] = handlers
    root.setLevel(level)


def fail() -> None:
    raise OSError(SIGNED)


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """Return the JSON lines written so far."""
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


@pytest.mark.parametrize(
    ("text", "written"),
    [
        (f"GET {SIGNED} failed", "GET https://images.example.org/trap/1.jpg?<redacted> failed"),
        (f"('{SIGNED}', 1)", "('https://images.example.org/trap/1.jpg?<redacted>', 1)"),
        ("HTTPS://HOST/a?b=5ec2e7", "HTTPS://HOST/a?<redacted>"),
        ("http://a/b?c=1 http://d/e?f=2", "http://a/b?<redacted> http://d/e?<redacted>"),
        ("broken by EOF: /trap/1.jpg?X-Amz-Signature=5ec2e7", "broken by EOF: /trap/1.jpg?<redacted>"),
        (f"Authorization: Token {TOKEN}", "Authorization: Token <redacted>"),
        (f"authorization: bearer {TOKEN}", "authorization: bearer <redacted>"),
        ("http://localhost:8000/api/v2/jobs/ is up", "http://localhost:8000/api/v2/jobs/ is up"),
        ("what now?", "what now?"),
        ("http://a/b#c?d=5ec2e7", "http://a/b#c?<redacted>"),
        ("https://user:pa@ss@h/x", "https://<redacted>@h/x"),
        ("postgresql://ami:secret@db:5432/ami", "postgresql://<redacted>@db:5432/ami"),
        ("nats://token@nats:4222 and a@b.test", "nats://<redacted>@nats:4222 and a@b.test"),
    ],
)
def test_queries_and_tokens_are_cut_and_the_rest_is_kept(text: str, written: str) -> None:
    """One can still see which image of which host it was."""
    assert redact(text) == written


def test_an_event_is_written_with_its_fields_level_module_and_time(capsys: pytest.CaptureFixture[str]) -> None:
    """One JSON object a line."""
    log.configure("json", "info")
    log.get_logger("adc_worker.test").info("job_summary", wall_s=1.5, images=3, ended=True, reason=None)
    (line,) = lines(capsys)
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "event": "job_summary",
        "level": "info",
        "module": "test",
        "wall_s": 1.5,
        "images": 3,
        "ended": True,
        "reason": None,
    }


@pytest.mark.parametrize(
    "value",
    [
        SIGNED,
        [SIGNED, f"Token {TOKEN}"],
        (SIGNED,),
        {"headers": {"Authorization": f"Token {TOKEN}"}, "tries": [{"url": SIGNED}]},
        {SIGNED},
        SIGNED.encode(),
        ValueError(f"{SIGNED} with Token {TOKEN}"),
    ],
    ids=["text", "list", "tuple", "nested", "set", "bytes", "exception"],
)
def test_no_value_of_any_shape_carries_a_secret(capsys: pytest.CaptureFixture[str], value: object) -> None:
    """Values are looked into, and what cannot be looked into is redacted as it would be written."""
    log.configure("json", "info")
    log.get_logger("test").info("tried", value=value)
    written = capsys.readouterr().err
    assert "images.example.org" in written
    assert not [secret for secret in SECRETS if secret in written]


def test_the_event_itself_is_redacted(capsys: pytest.CaptureFixture[str]) -> None:
    """Somebody will write a sentence there."""
    log.configure("json", "info")
    log.get_logger("test").info(f"got {SIGNED}")
    assert lines(capsys)[0]["event"] == "got https://images.example.org/trap/1.jpg?<redacted>"


def test_values_json_does_not_know_are_written_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    """A path or a decimal costs no log line."""
    log.configure("json", "info")
    log.get_logger("test").info("at", path=Path("/srv"), share=Decimal("0.5"))
    (line,) = lines(capsys)
    assert "/srv" in line["path"]
    assert "0.5" in line["share"]


def test_a_traceback_is_redacted(capsys: pytest.CaptureFixture[str]) -> None:
    """Exceptions of HTTP libraries carry whole URLs."""
    log.configure("json", "info")
    try:
        fail()
    except OSError:
        log.get_logger("test").exception("failed")
    (line,) = lines(capsys)
    assert "OSError: https://images.example.org/trap/1.jpg?<redacted>" in line["exception"]
    assert "5ec2e7" not in json.dumps(line)


def test_the_console_shows_no_secret_either(capsys: pytest.CaptureFixture[str]) -> None:
    """Terminals are copied into tickets."""
    log.configure("console", "info")
    log.get_logger("test").info("tried", url=SIGNED, header=f"Token {TOKEN}")
    written = capsys.readouterr().err
    assert "https://images.example.org/trap/1.jpg?<redacted>" in written
    assert not [secret for secret in SECRETS if secret in written]


def test_events_below_the_level_are_not_written(capsys: pytest.CaptureFixture[str]) -> None:
    """AMI_LOG_LEVEL means that much."""
    log.configure("json", "warning")
    log.get_logger("test").info("small_talk")
    log.get_logger("test").warning("important")
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)["event"] == "important"


@pytest.mark.parametrize("library", ["httpx", "urllib3.connectionpool"])
def test_what_libraries_say_below_a_warning_is_dropped(capsys: pytest.CaptureFixture[str], library: str) -> None:
    """They log every URL they ask."""
    log.configure("json", "info")
    logging.getLogger(library).info("HTTP Request: GET %s", SIGNED)
    assert lines(capsys) == []


@pytest.mark.parametrize("library", ["httpx", "urllib3.connectionpool"])
def test_warnings_of_libraries_are_written_without_secrets(capsys: pytest.CaptureFixture[str], library: str) -> None:
    """Also where the secret comes in by an argument."""
    log.configure("json", "info")
    logging.getLogger(library).warning("Retrying after %r: %s", ValueError(f"Token {TOKEN}"), SIGNED)
    written = capsys.readouterr().err
    assert written.startswith(f"{library}: Retrying after")
    assert "https://images.example.org/trap/1.jpg?<redacted>" in written
    assert not [secret for secret in SECRETS if secret in written]


def test_tracebacks_of_libraries_are_redacted(capsys: pytest.CaptureFixture[str]) -> None:
    """Executors and event loops log what nobody caught."""
    log.configure("json", "info")
    try:
        fail()
    except OSError:
        logging.getLogger("concurrent.futures").exception("exception calling callback")
    written = capsys.readouterr().err
    assert "OSError: https://images.example.org/trap/1.jpg?<redacted>" in written
    assert "5ec2e7" not in written


def test_a_secret_that_was_named_is_cut_out_wherever_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also without the word Token before it; words too short to be secrets stay."""
    monkeypatch.setattr("adc_worker.redaction._hidden", set())
    hide("5ec2e7canary")
    hide("the")
    hide("")
    assert redact("X5ec2e7canaryX is the token") == "X<redacted>X is the token"


def test_what_nobody_caught_is_redacted_in_the_main_thread_and_in_others(capsys: pytest.CaptureFixture[str]) -> None:
    """The interpreter prints it past every logger."""
    log.configure("json", "info")
    try:
        fail()
    except OSError as error:
        sys.excepthook(type(error), error, error.__traceback__)
        threading.excepthook(threading.ExceptHookArgs((type(error), error, error.__traceback__, None)))
    thread = threading.Thread(target=fail, name="poster")
    thread.start()
    thread.join()
    written = capsys.readouterr().err
    assert written.count("OSError: https://images.example.org/trap/1.jpg?<redacted>") == 3
    assert "in thread poster" in written
    assert "5ec2e7" not in written


def test_other_handlers_get_the_record_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    """Redacting one line changes nothing for anybody else."""
    log.configure("json", "info")
    record = logging.LogRecord("x", logging.WARNING, __file__, 1, "%s bytes", (3,), None)
    logging.getLogger().handle(record)
    assert capsys.readouterr().err == "x: 3 bytes\n"
    assert record.args == (3,)


def test_standard_output_stays_free(capsys: pytest.CaptureFixture[str]) -> None:
    """It belongs to the commands' own output."""
    log.configure("json", "info")
    log.get_logger("test").info("something")
    print("page", file=sys.stdout)  # noqa: T201 (the command's output)
    assert capsys.readouterr().out == "page\n"


def test_warnings_are_counted_by_cause(capsys: pytest.CaptureFixture[str]) -> None:
    """The same one thrice is one line with a count; the latest comes first, and there is an end."""
    log.configure("json", "info")
    logger = log.get_logger("test")
    for _ in range(3):
        logger.warning("fetch_failed", error="503")
    logger.error("post_failed", error=SIGNED)
    first, second = log.recent_causes()[:2]
    assert (first.event, first.text, first.count) == (
        "post_failed",
        "https://images.example.org/trap/1.jpg?<redacted>",
        1,
    )
    assert (second.event, second.text, second.count) == ("fetch_failed", "503", 3)
    for number in range(log.CAUSES_KEPT + 5):
        logger.warning("many", error=str(number))
    assert len(log.recent_causes()) == log.CAUSES_KEPT
    assert capsys.readouterr().err
