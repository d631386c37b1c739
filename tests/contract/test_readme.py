"""README tells the truth: its tree is the tree, its Python runs."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from pathlib import Path

from support.served import serving_demo

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The fenced code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_the_tree_is_the_tree() -> None:
    """Every path that the tree names exists, and every package of ours is in it."""
    tree = next(block for block in blocks("text") if "saeguard_server/" in block)
    path: list[str] = []
    named = set()
    for line in tree.splitlines():
        match = re.match(r"^(\s*)([\w./-]+)(\s{2,}|$)", line)
        if not match:
            continue
        depth, name = len(match[1]) // 4, match[2]
        path = [*path[:depth], name.rstrip("/")]
        named.add("/".join(path))
    missing = [one for one in named if not (ROOT / one).exists()]
    assert not missing
    folders = {
        str(one.parent.relative_to(ROOT))
        for top in ("sae/saeguard_sae", "server/saeguard_server", "client/saeguard_client")
        for one in (ROOT / top).glob("*/__init__.py")
    }
    unnamed = {one for one in folders if one not in named and not one.rsplit("/", 1)[1].startswith("_")}
    assert not unnamed


async def test_the_python_runs() -> None:
    programs = blocks("python")
    assert programs
    async with serving_demo() as app:
        for program in programs:
            here = program.replace("127.0.0.1:50051", f"127.0.0.1:{app.port}")
            done = await asyncio.to_thread(
                subprocess.run, [sys.executable, "-c", here], capture_output=True, text=True, timeout=60, check=False
            )
            assert done.returncode == 0, done.stderr
            assert done.stdout
