"""CONTRIBUTING's recipes hold: their files exist, and what they say is enough is enough."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

import saeguard_client
from saeguard import wire
from saeguard.types import KINDS, Intervention
from saeguard.v1 import intervention_pb2
from saeguard_client import cli
from saeguard_sae.edits import Affine
from saeguard_sae.formats import FORMATS
from saeguard_server.engine.protocol import CompiledEdit
from saeguard_server.policy.document import policies_from_yaml, policy_to_yaml
from saeguard_server.policy.tighten import FeatureEffect, already_meets

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
UNIT_SCALE = 2.0


def takes_a_number(kind: str) -> bool:
    return len(dataclasses.fields(KINDS[kind])) > len(dataclasses.fields(Intervention))


def an_edit(kind: str) -> Intervention:
    return KINDS[kind]("mid", 1, *([0.5] if takes_a_number(kind) else []))


def test_every_path_exists() -> None:
    paths = [path for path in re.findall(r"`([\w.-]+(?:/[\w.-]+)+)`", TEXT) if path.partition("/")[0] != "."]
    assert len(paths) > 30
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_every_kind_is_a_message_and_a_name_of_the_client() -> None:
    fields = intervention_pb2.Intervention.DESCRIPTOR.oneofs_by_name["kind"].fields
    assert [field.name for field in sorted(fields, key=lambda field: field.number)] == list(KINDS)
    assert not [edit for edit in KINDS.values() if getattr(saeguard_client, edit.__name__) is not edit]


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_edit_comes_with_all_that_users_need(kind: str) -> None:
    edit = an_edit(kind)
    message = wire.to_message(intervention_pb2.Intervention, edit)
    assert message.WhichOneof("kind") == kind
    assert wire.from_message(Intervention, message) == edit

    value = "0.5" if takes_a_number(kind) else "true"
    text = f"name: a\nmode: enforce\nrules:\n  - {{name: r, sae: mid, feature: 1, {kind}: {value}}}\n"
    (policy,) = policies_from_yaml(text)
    assert policy.rules[0].intervention == edit
    assert policies_from_yaml(policy_to_yaml(policy)) == (policy,)

    effect = FeatureEffect.of(kind, Affine(*edit.affine(UNIT_SCALE)))
    assert already_meets(effect, effect)

    operand = "=0.5" if takes_a_number(kind) else ""
    arguments = cli.build_parser().parse_args(["generate", "x", f"--{kind}", f"mid:1{operand}"])
    assert [flag.kind for flag in arguments.edits] == [kind]


def test_a_format_is_one_module_with_three_names() -> None:
    for module in FORMATS:
        assert isinstance(module.NAME, str)
        assert callable(module.recognises)
        assert callable(module.parse)
    contract = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert not [module for module in FORMATS if f'"saeguard_sae.formats.{module.NAME}"' not in contract]
    assert CompiledEdit.__module__ == "saeguard_server.engine.protocol"
