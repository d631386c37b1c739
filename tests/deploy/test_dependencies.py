"""What the project brings along: every package is pinned for development, and its licence is one that we can ship."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

SHIPPED = "saeguard[server,postgres,train]"
PERMISSIVE = {
    "0BSD", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "CNRI-Python", "ISC", "MIT", "MIT-0",
    "MIT-CMU", "PSF-2.0", "Zlib",
}  # fmt: skip
# Used as libraries, unchanged: they ask for their own source to stay available, which it is.
WEAK_COPYLEFT = {"LGPL-3.0-only", "MPL-2.0"}
WORDS = {
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
    "Apache License 2.0": "Apache-2.0",
    "Apache License, Version 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD": "BSD-3-Clause",
    "BSD License": "BSD-3-Clause",
    "BSD-3-Clause License": "BSD-3-Clause",
    "GNU Lesser General Public License v3 (LGPLv3)": "LGPL-3.0-only",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
}
"""What older metadata say in place of an SPDX identifier."""


def installed(requirement: str) -> Iterator[Distribution]:
    """Everything that a requirement brings along on this machine, each package once."""
    waiting, seen = [Requirement(requirement)], set[tuple[str, frozenset[str]]]()
    names = set[str]()
    while waiting:
        needed = waiting.pop()
        key = canonicalize_name(needed.name), frozenset(needed.extras)
        if key in seen:
            continue
        seen.add(key)
        package = distribution(needed.name)
        if key[0] not in names:
            names.add(key[0])
            yield package
        for more in map(Requirement, package.requires or ()):
            extras = needed.extras or {""}
            if more.marker is None or any(more.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(more)


def licences(package: Distribution) -> set[str]:
    """SPDX identifiers of its metadata: the expression, else the classifiers, else the words in its licence field."""
    expression = package.metadata.get("License-Expression")
    if expression is None and re.fullmatch(r"[\w.-]+( (AND|OR) [\w.-]+)+", package.metadata.get("License") or ""):
        expression = package.metadata["License"]
    if expression is not None:
        return set(re.split(r"\s+(?:AND|OR|WITH)\s+|[()]", expression)) - {"", "LLVM-exception"}
    classifiers = package.metadata.get_all("Classifier") or []
    stated = [line.rpartition(" :: ")[2] for line in classifiers if line.startswith("License :: ")]
    stated = [line for line in stated if line != "OSI Approved"] or [package.metadata.get("License") or ""]
    return {WORDS.get(text.strip(), text.strip()) for text in stated}


@pytest.fixture(scope="module")
def shipped() -> list[Distribution]:
    try:
        packages = list(installed(SHIPPED))
    except PackageNotFoundError as err:
        pytest.fail(f"the development environment lacks {err.name}")
    assert len(packages) > 50
    return [package for package in packages if package.name != "saeguard"]


def test_every_package_is_pinned_in_the_version_that_is_tested(shipped: list[Distribution], deploy: Path) -> None:
    lines = (deploy.parent / "constraints.txt").read_text().splitlines()
    pins = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    # torch's wheel for CPUs says so in its version.
    versions = {canonicalize_name(package.name): package.version.partition("+")[0] for package in shipped}
    assert {name: pins.get(name) for name in versions} == versions


def test_every_licence_is_one_that_can_be_shipped(shipped: list[Distribution]) -> None:
    stated = {package.name: licences(package) for package in shipped}
    assert {name: names for name, names in stated.items() if not names <= PERMISSIVE | WEAK_COPYLEFT} == {}
    weak = {name for name, names in stated.items() if names & WEAK_COPYLEFT}
    assert weak == {"psycopg", "psycopg-binary", "tqdm"}


def test_the_base_install_stays_thin() -> None:
    names = {canonicalize_name(package.name) for package in installed("saeguard")}
    own = {"grpcio", "grpcio-status", "protobuf"}
    assert names == {"saeguard", *own, "googleapis-common-protos", "typing-extensions"}
