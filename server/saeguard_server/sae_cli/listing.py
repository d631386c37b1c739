"""``saeguard sae list``: the releases that have a name, the SAEs of one, or those in a folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from saeguard_client.cli.columns import table
from saeguard_sae import releases
from saeguard_sae.loading import detect_format


def add(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The action's arguments."""
    parser = actions.add_parser(
        "list",
        help="list releases, the SAEs of a release, or those in a folder",
        description="Without an argument, every release that can be named as a path.",
    )
    parser.add_argument("what", nargs="?", default="", help="a release, words in its name, or a folder")
    parser.set_defaults(act=act)


def act(arguments: argparse.Namespace) -> int:
    """Prints a table; 1 when there is nothing."""
    what: str = arguments.what
    rows = list(_folder(Path(what)) if what and Path(what).is_dir() else _releases(what))
    for line in table(rows) if len(rows) > 1 else ():
        sys.stdout.write(f"{line}\n")
    if len(rows) < 2:
        sys.stderr.write(f"saeguard sae list: nothing is called {what!r}\n")
    return 0 if len(rows) > 1 else 1


def _folder(folder: Path) -> Iterator[tuple[str, ...]]:
    yield ("PATH", "FORMAT")
    for here in [folder, *sorted(one for one in folder.rglob("*") if one.is_dir())]:
        # A folder that is one SAE, or else the files in it that are one each.
        for path in [here] if detect_format(here) else sorted(one for one in here.iterdir() if one.is_file()):
            if kind := detect_format(path):
                yield (str(path.relative_to(folder)), kind)


def _releases(what: str) -> Iterator[tuple[str, ...]]:
    every = releases.all_releases()
    if what in every:
        yield ("PATH", "FILES", "L0")
        for one in every[what].saes.values():
            yield (f"{what}/{one.id}", f"hf://{every[what].repo}/{one.path}", "-" if one.l0 is None else f"{one.l0:g}")
        return
    yield ("RELEASE", "MODEL", "SAES", "REPOSITORY")
    for name, release in sorted(every.items()):
        if all(word in name for word in what.split()):
            yield (name, release.model, str(len(release.saes)), release.repo)
