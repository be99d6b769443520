"""The parts of README.md that are made from the code: `python -m tests.support.readme` writes them anew."""

from __future__ import annotations

from pathlib import Path

from pydantic import SecretStr

from adc_worker.settings import Settings, effect_of, variable

README = Path(__file__).parents[2] / "README.md"
START, END = "<!-- settings: made by python -m tests.support.readme -->\n", "<!-- end of settings -->\n"
EFFECTS = {"required": "**set this**", "limits": "limits", "none": "no effect", "sets": ""}


def settings_table() -> str:
    """Return a Markdown table of every variable, in the order of `Settings`."""
    lines = ["| variable | default | meaning | |", "|---|---|---|---|"]
    for name, info in Settings.model_fields.items():
        default = "" if isinstance(info.default, SecretStr) or info.default in (None, ()) else str(info.default)
        shown = "`~/.local/share/adc-worker`" if name == "user_data_path" else f"`{default}`" if default else ""
        meaning = str(info.description).replace("|", "\\|")
        lines.append(f"| `{variable(name)}` | {shown} | {meaning} | {EFFECTS[effect_of(name)]} |")
    return "\n".join(lines) + "\n"


def with_settings(text: str) -> str:
    """Return the README's text with a fresh table in it."""
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{settings_table()}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(with_settings(README.read_text(encoding="utf-8")), encoding="utf-8")
