"""What the worker needs at run time: declared with a lower bound, imported, and explained in README.md."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODULES = {
    "nats-py": "nats",
    "pillow": "PIL",
    "prometheus-client": "prometheus_client",
    "pydantic-settings": "pydantic_settings",
    "python-dotenv": "dotenv",
}


def declared() -> dict[str, str]:
    """Return the run-time dependencies by name, each with its bound."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return dict(re.fullmatch(r"([\w-]+)(.*)", text).groups() for text in project["dependencies"])  # type: ignore[union-attr, misc]


def imported() -> set[str]:
    """Return the top-level modules that the package imports anywhere but at the desk."""
    found: set[str] = set()
    for file in (ROOT / "adc_worker").rglob("*.py"):
        if "desk" in {file.parent.name, file.stem}:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found.update(alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                found.add(str(node.module).split(".")[0])
    return found


def test_every_dependency_has_a_lower_bound_and_no_upper_one() -> None:
    """An upper bound would keep security releases out."""
    assert all(re.fullmatch(r">=[\d.]+", bound) for bound in declared().values())


def test_what_is_imported_is_what_is_declared() -> None:
    """What nobody imports only brings risk; what comes with something else may go with it."""
    own = {"adc_worker", *sys.stdlib_module_names}
    assert imported() - own == {MODULES.get(name, name) for name in declared()}


def test_every_dependency_is_explained() -> None:
    """One table, one reason each."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.split("## Run-time dependencies")[1].split("\n\n")[1]
    names = {name for line in table.splitlines()[2:] for name in re.findall(r"[a-z][\w-]+", line.split("|")[1])}
    assert names == set(declared())
