"""Rules about the source that no linter knows."""

from __future__ import annotations

import ast
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("saeguard", "saeguard_sae", "saeguard_server", "saeguard_client")
FOREIGN = re.compile(r"\bhook_(resid|mlp|attn|embed|z\b)|\bblocks\.\d|attn\.hook_z|ln2\.hook")


def sources() -> dict[Path, ast.Module]:
    """Every source file of ours, parsed."""
    files = [path for top in ("sae", "server", "client") for path in sorted((ROOT / top).rglob("*.py"))]
    assert len(files) > 60
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in files}


def strings(tree: ast.Module) -> Iterator[ast.Constant]:
    """String constants that are not docstrings."""
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node


def test_foreign_hook_names_stay_in_the_formats() -> None:
    formats = ROOT / "sae" / "saeguard_sae" / "formats"
    found: dict[bool, list[str]] = {True: [], False: []}
    for path, tree in sources().items():
        for node in strings(tree):
            if FOREIGN.search(str(node.value)):
                found[path.is_relative_to(formats)].append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert found[True], "the walker sees none where there are some"
    assert not found[False]


def test_the_environment_is_read_in_settings_only() -> None:
    readers = set()
    for path, tree in sources().items():
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Attribute)
                and node.attr in ("environ", "getenv")
                and isinstance(node.value, ast.Name)
            ):
                readers.add(path.name)
    assert readers <= {"settings.py"}


def test_no_file_is_called_utils() -> None:
    assert not [path for path in sources() if path.stem in ("utils", "helpers", "util", "misc", "common")]


def test_files_stay_small() -> None:
    long = {str(path.relative_to(ROOT)): n for path in sources() if (n := len(path.read_text().splitlines())) > 800}
    assert not long


def modules() -> list[str]:
    """Every module of ours that is meant to be imported."""
    found = []
    for package in PACKAGES:
        where = import_module(package).__path__
        found += [one.name for one in pkgutil.walk_packages(where, f"{package}.") if not one.name.endswith("__main__")]
    assert len(found) > 60
    return found


def test_importing_has_no_effect() -> None:
    """In a bare process: no output, no thread, no environment variable, no file."""
    program = "\n".join(
        [
            "import os, threading, importlib",
            "before = (dict(os.environ), threading.active_count(), sorted(os.listdir()))",
            f"for name in {modules()!r}: importlib.import_module(name)",
            "after = (dict(os.environ), threading.active_count(), sorted(os.listdir()))",
            "changed = set(after[0].items()) ^ set(before[0].items())",
            "ours = {name for name, _ in changed if name.startswith('SAEGUARD')}",
            "assert not ours and before[1:] == after[1:], (ours, before[1:], after[1:])",
        ]
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_the_client_needs_neither_torch_nor_numpy() -> None:
    heavy = "{'torch', 'numpy', 'transformers'}"
    program = f"import sys, saeguard_client, saeguard_client.cli; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("package", ["saeguard", *PACKAGES])
def test_every_package_is_typed(package: str) -> None:
    assert (Path(next(iter(import_module(package).__path__))) / "py.typed").is_file()


def test_imports_point_one_way() -> None:
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert re.search(r"[1-9]\d* kept, 0 broken", done.stdout)
