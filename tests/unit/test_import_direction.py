"""Imports point one way: the layout of the package, read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "adc_worker"
MODULES = {
    ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): file
    for file in sorted(PACKAGE.rglob("*.py"))
}

# What each part may import besides itself; a sibling is not in the list.
BASE = {"", "settings", "errors", "log", "redaction"}
LOWER = BASE | {"host", "antenna"}
MIDDLE = LOWER | {"planning"}
ALLOWED = {
    "": {""},
    "errors": set(),
    "redaction": set(),
    "settings": {"", "errors", "redaction"},
    "log": {"", "redaction"},
    "host": BASE,
    "antenna": BASE,
    "planning": LOWER,
    "desk": BASE | {"antenna"},
    "status": LOWER,
    "journal": MIDDLE,
    "ingest": MIDDLE,
    "models": MIDDLE,
    "runtime": MIDDLE | {"journal", "ingest", "models", "status"},
    "cli": MIDDLE | {"journal", "ingest", "models", "runtime", "status", "desk"},
    "__main__": {"cli"},
}
TORCH = {"torch", "torchvision"}


@cache
def imports(module: str) -> frozenset[str]:
    """Return the full names a module imports anywhere in it; `from a import b` is a.b where that is a module."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports by a relative name"
            source = node.module or ""
            found.update(name if (name := f"{source}.{alias.name}") in MODULES else source for alias in node.names)
    return frozenset(found)


def part(module: str) -> str:
    """Return what is below adc_worker: a package, or a module of the top level."""
    return f"{module}..".split(".")[1]


def own_imports() -> Iterator[tuple[str, str]]:
    for module in MODULES:
        for name in imports(module):
            if name.split(".")[0] == "adc_worker":
                yield module, name


def test_imports_follow_the_arrows() -> None:
    """settings, errors, log -> host, antenna -> planning -> journal, ingest, models, status -> runtime -> cli."""
    against = [
        f"{module} imports {name}"
        for module, name in own_imports()
        if part(name) != part(module) and part(name) not in ALLOWED[part(module)]
    ]
    assert against == []


def test_every_part_of_the_package_has_its_place() -> None:
    """A new package is put into the table above, or this table means nothing."""
    assert {part(module) for module in MODULES} == set(ALLOWED)


def test_no_module_imports_what_does_not_exist() -> None:
    """A name that is looked for in vain would pass every rule above."""
    assert [name for _module, name in own_imports() if name not in MODULES] == []


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    """Also within a package."""
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for name in imports(module) & MODULES.keys():
                visit(name, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


@pytest.mark.parametrize("module", ["adc_worker.planning.policy", "adc_worker.planning.plan"])
def test_the_policy_is_pure(module: str) -> None:
    """The standard library's arithmetic, and the values it gets and returns."""
    values = {
        "adc_worker.antenna.leases",
        "adc_worker.host.budget",
        "adc_worker.planning.ceilings",
        "adc_worker.planning.memory_cost",
        "adc_worker.planning.plan",
        "adc_worker.planning.measurements",
        "adc_worker.planning.reasoned",
    }
    arithmetic = {"__future__", "math", "dataclasses", "typing", "types", "collections.abc", "enum"}
    assert imports(module) <= values | arithmetic


def test_only_three_packages_know_torch() -> None:
    """370 MB in every process that imports it: nobody but the child does."""
    users = {part(module) for module in MODULES if any(name.split(".")[0] in TORCH for name in imports(module))}
    assert users <= {"ingest", "models", "runtime"}


def test_the_parent_never_imports_torch() -> None:
    """Neither directly nor through what the supervisor and the command line pull in."""
    code = (
        "import sys, adc_worker.cli.main, adc_worker.runtime.supervisor;"
        "print([name for name in sys.modules if name.split('.')[0] in {'torch', 'torchvision'}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"


def _reads_environment(node: ast.AST) -> bool:
    named = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os"
    if named:
        return getattr(node, "attr", "") in {"environ", "environb", "getenv", "getenvb"}
    return isinstance(node, ast.ImportFrom) and node.module == "os" and any("env" in alias.name for alias in node.names)


def test_settings_alone_read_the_environment() -> None:
    """Others hand it to children whole, or ask what CUDA and systemd set."""
    readers = {
        module
        for module in MODULES
        if any(_reads_environment(node) for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))))
    }
    to_children = {"adc_worker.runtime.supervisor", "adc_worker.cli.demo"}
    assert readers == {"adc_worker.settings", "adc_worker.host.budget", *to_children}


def test_outside_settings_no_ami_variable_is_read() -> None:
    """Of the others only CUDA's and systemd's are asked for by name; demo's child gets its AMI_ variables set."""
    asked = set()
    for module in MODULES.keys() - {"adc_worker.settings"}:
        for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
            inner = node.func.value if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else None
            inner = node.value if isinstance(node, ast.Subscript) else inner
            key = node.args[0] if isinstance(node, ast.Call) and node.args else getattr(node, "slice", None)
            if inner is not None and _reads_environment(inner) and isinstance(key, ast.Constant):
                asked.add(key.value)
    assert asked == {"CUDA_VISIBLE_DEVICES", "NOTIFY_SOCKET", "WATCHDOG_USEC"}
