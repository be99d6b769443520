"""The command line as far as it goes without starting anything."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from adc_worker import __version__
from adc_worker.cli.main import cli, main
from adc_worker.errors import ExitCode


def ami(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments)


def test_help_names_every_command_and_the_two_settings() -> None:
    """What a newcomer reads first."""
    told = ami("--help").output
    for word in ("demo", "devserver", "settings", "worker", "AMI_ANTENNA_API_BASE_URL", "AMI_ANTENNA_API_AUTH_TOKEN"):
        assert word in told


@pytest.mark.parametrize("arguments", [("--version",), ("worker", "--version")])
def test_the_version_is_the_packages(arguments: tuple[str, ...]) -> None:
    assert __version__ in ami(*arguments).output


@pytest.mark.parametrize("command", [("worker",), ("worker", "run")])
def test_a_missing_token_is_one_line_whichever_way_the_worker_is_started(command: tuple[str, ...]) -> None:
    """`ami worker` and `ami worker run` are the same program."""
    done = ami(*command, "--pipeline", "simulated")
    assert done.exit_code == ExitCode.CONFIGURATION
    (line,) = done.output.splitlines()
    assert (
        line == "ami: AMI_ANTENNA_API_AUTH_TOKEN is not set: "
        "copy it from the page of the worker's user in Antenna into .env"
    )


def test_a_misspelt_token_variable_is_named_where_the_token_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The warnings of the start would come too late."""
    monkeypatch.setenv("AMI_ANTENNA_API_AUTH_TOKN", "canary-token")
    (line,) = ami("worker").output.splitlines()
    assert line.endswith(
        "; AMI_ANTENNA_API_AUTH_TOKN is not a setting of this worker; did you mean AMI_ANTENNA_API_AUTH_TOKEN?"
    )
    assert "canary" not in line


def test_a_report_that_cannot_be_written_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AMI_USER_DATA_PATH", str(tmp_path))
    (tmp_path / "last-job.json").write_text('{"jobs": [{"id": 1}]}')
    done = ami("worker", "report", str(tmp_path / "no" / "folder.html"))
    assert done.exit_code == ExitCode.FAILED
    assert "folder.html: No such file or directory" in done.output


@pytest.mark.parametrize("content", ["", '{"jobs": [', "[]", '{"jobs": []}', '{"jobs": 7}'])
def test_a_damaged_report_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str) -> None:
    """With what to do about it."""
    monkeypatch.setenv("AMI_USER_DATA_PATH", str(tmp_path))
    (tmp_path / "last-job.json").write_text(content)
    done = ami("worker", "report", str(tmp_path / "report.html"))
    assert done.exit_code == ExitCode.FAILED
    assert "last-job.json is damaged: remove it" in done.output


def test_an_env_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    """With `run` or without: an option is never ignored."""
    missing = str(tmp_path / "none.env")
    for arguments in (("worker", "--env-file", missing), ("worker", "run", "--env-file", missing)):
        done = ami(*arguments)
        assert done.exit_code == ExitCode.CONFIGURATION
        assert missing in done.output


def test_a_misspelt_command_is_no_argument_of_run() -> None:
    assert "No such command 'statsu'" in ami("worker", "statsu").output


def test_the_settings_in_force_are_shown_without_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """The token is masked, the rest is as the environment says."""
    monkeypatch.setenv("AMI_ANTENNA_API_AUTH_TOKEN", "canary-token")
    monkeypatch.setenv("AMI_MEMORY_SOFT_CAP", "0.5")
    told = ami("settings").output
    assert "AMI_MEMORY_SOFT_CAP=0.5" in told
    assert "canary-token" not in told


def test_elsewhere_than_on_linux_one_line_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything that does not exist there is imported."""
    monkeypatch.setattr("sys.platform", "win32")
    with pytest.raises(SystemExit, match=r"^ami: runs on Linux, not on win32: .+"):
        main()


def test_the_shell_completes_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the help says: the script that bash evaluates, and what that then asks for."""
    monkeypatch.setattr("sys.argv", ["ami"])
    for instruction, says in (("bash_source", "complete -o nosort -F"), ("bash_complete", "plain,status")):
        env = {"_AMI_COMPLETE": instruction, "COMP_WORDS": "ami worker st", "COMP_CWORD": "2"}
        assert says in CliRunner().invoke(cli, prog_name="ami", env=env).output
