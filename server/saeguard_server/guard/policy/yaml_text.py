"""YAML as policies use it: the safe subset, where nothing is guessed and nothing is said twice."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

MAX_CHARS = 8 * 2**20
"""Of one text."""
MAX_DEPTH = 32


class BadYaml(ValueError):
    """Not YAML, or more of YAML than policies use; the message says on which line."""


class _Loader(yaml.CSafeLoader):
    """Only true and false are booleans, so that ``mode: off`` is a word; 012 and 1:30 are no numbers, dates text."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                raise BadYaml(f"{_line(key.start_mark)}: a key must be a word")
            if key.value in seen:
                raise BadYaml(f"{_line(key.start_mark)}: {key.value!r} is given twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what ``_Loader``, or a reader of YAML 1.1, would not take as text; lists are indented."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """Lines as lines where every reader agrees what a line is; escapes where somebody might not."""
    is_plain = all(line.isprintable() for line in text.split("\n"))
    style = '"' if not is_plain else "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
_FLOAT = re.compile(r"[-+]?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][-+]?\d+)?")
for _tag, _pattern, _first in (
    ("null", r"~|null|", ["~", "n", ""]),
    ("bool", r"true|false", list("tf")),
    ("int", r"[-+]?(?:0|[1-9]\d*)", list("-+0123456789")),
    ("float", r"[-+]?(?:(?:0|[1-9]\d*)(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?", list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})\\Z"), _first)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(_FLOAT.pattern + r"\Z"), list("-+.0123456789"))


def read(text: str) -> list[Any]:
    """The documents of a text; empty ones are left out.

    Raises:
        BadYaml: it is none, a key is given twice, or it uses anchors or tags.
    """
    if len(text) > MAX_CHARS:
        raise BadYaml(f"at most {MAX_CHARS} characters, got {len(text)}")
    try:
        _check_events(text)
        return [one for one in yaml.load_all(text, Loader=_Loader) if one is not None]
    except yaml.YAMLError as err:
        raise BadYaml(_said(err)) from err


def write(tree: dict[str, Any]) -> str:
    """One document."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110, default_flow_style=None)


def _check_events(text: str) -> None:
    """Before anything is built: a few aliases can stand for more than memory holds, and deep nesting ends the stack."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.CSafeLoader):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise BadYaml(f"{_line(event.start_mark)}: anchors and aliases are not supported")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise BadYaml(f"{_line(event.start_mark)}: is nested too deeply")


def _line(mark: Any) -> str:
    return f"line {mark.line + 1}"


def _said(err: yaml.YAMLError) -> str:
    mark = getattr(err, "problem_mark", None)
    problem = getattr(err, "problem", None) or getattr(err, "reason", None) or "is not YAML"
    return f"{_line(mark)}: {problem}" if mark is not None else str(problem)
