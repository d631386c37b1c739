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

import grpc
import pytest

from saeguard_client.errors import BY_STATUS, SaeguardError
from saeguard_server.errors import RequestFieldError, ServiceError

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("saeguard", "saeguard_sae", "saeguard_server", "saeguard_client")
CEILING = 600
SHARED_CLASS_NAMES = {"Cancelled", "DeadlineExceeded", "PermissionDenied", "Unauthenticated", "Unavailable"}
"""Errors of the server that reach a caller as an exception of the same name, that of their gRPC status."""
VAGUE = {"one", "found", "made", "told", "asked", "wanted", "given", "shown", "kept", "held", "said"}
"""Words that stand where a noun of the field would."""
EXCEPTIONS = {
    "InvalidRequest": ("INVALID_REQUEST", "InvalidArgument"),
    "UnknownName": ("UNKNOWN_NAME", "NotFound"),
    "Unauthenticated": ("UNAUTHENTICATED", "Unauthenticated"),
    "PermissionDenied": ("PERMISSION_DENIED", "PermissionDenied"),
    "PolicyRefusal": ("POLICY_REFUSED", "PermissionDenied"),
    "QuotaExceeded": ("QUOTA_EXCEEDED", "ResourceExhausted"),
    "Conflict": ("CONFLICT", "Aborted"),
    "ReadOnlyStore": ("READ_ONLY_STORE", "FailedPrecondition"),
    "NotConfigured": ("NOT_CONFIGURED", "FailedPrecondition"),
    "NotRead": ("NOT_READ", "Cancelled"),
    "Overloaded": ("OVERLOADED", "ResourceExhausted"),
    "DeadlineExceeded": ("DEADLINE_EXCEEDED", "DeadlineExceeded"),
    "Cancelled": ("CANCELLED", "Cancelled"),
    "Unavailable": ("UNAVAILABLE", "Unavailable"),
    "PoliciesUnavailable": ("POLICIES_UNAVAILABLE", "Unavailable"),
    "ActivationNotReached": ("ACTIVATION_NOT_REACHED", "FailedPrecondition"),
    "NonFiniteOutput": ("NON_FINITE_OUTPUT", "FailedPrecondition"),
    "InternalFailure": ("INTERNAL", "InternalError"),
}
"""Reason and client exception by the server's class."""
FOREIGN = re.compile(r"\bhook_(resid|mlp|attn|embed|z\b)|\bblocks\.\d|attn\.hook_z|ln2\.hook")


def sources() -> dict[Path, ast.Module]:
    """Every source file of ours, parsed."""
    files = [path for top in ("proto", "sae", "server", "client") for path in sorted((ROOT / top).rglob("*.py"))]
    files = [path for path in files if "_pb2" not in path.name]
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
    assert readers <= {"main.py", "settings.py"}


def test_no_file_is_called_utils() -> None:
    assert not [path for path in sources() if path.stem in ("utils", "helpers", "util", "misc", "common")]


def test_files_stay_below_their_ceiling() -> None:
    sizes = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in sources()}
    assert not {path: size for path, size in sizes.items() if size > CEILING}


def test_a_class_is_defined_in_one_package() -> None:
    """A name that the client and the server each define is one thing in two forms."""
    packages: dict[str, set[str]] = {}
    for path, tree in sources().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                packages.setdefault(node.name, set()).add(path.relative_to(ROOT).parts[1])
    assert {name for name, where in packages.items() if len(where) > 1} == SHARED_CLASS_NAMES


def server_errors(base: type[ServiceError] = ServiceError) -> Iterator[type[ServiceError]]:
    for error in base.__subclasses__():
        if error is not RequestFieldError:
            yield error
        yield from server_errors(error)


def client_exception(error: type[ServiceError]) -> type[SaeguardError]:
    return BY_STATUS[grpc.StatusCode[error.status]]


def test_every_error_has_a_reason_a_status_and_a_client_exception() -> None:
    errors = [error for error in server_errors() if error.__module__ == ServiceError.__module__]
    assert {error.__name__: (error.reason, client_exception(error).__name__) for error in errors} == EXCEPTIONS
    assert len({error.reason for error in errors}) == len(errors)


def test_a_shared_name_is_of_an_error_and_of_its_exception() -> None:
    """Elsewhere the names differ: the server's says what was wrong, the client's which status tells of it."""
    shared = {error.__name__ for error in server_errors() if error.__name__ == client_exception(error).__name__}
    assert shared == SHARED_CLASS_NAMES
    assert len(SHARED_CLASS_NAMES) <= 5


def test_variables_are_nouns() -> None:
    vague = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.id}"
        for path, tree in sources().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in VAGUE
    ]
    assert not vague


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
