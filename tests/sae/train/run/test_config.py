"""Configurations: what is understood, and what is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from saeguard_sae.train.run.config import BadConfig, config_as_json, differences, load_run_config, parse_run_config

Tree = dict[str, Any]


def test_a_whole_configuration(tree: Tree) -> None:
    config = parse_run_config(tree)
    assert (config.stream.batch, config.stream.context, config.run.tokens) == (64, 32, 2560)
    assert config.steps == 40
    assert [one.name for one in config.saes] == ["mid"]


def test_steps_are_whole_batches(tree: Tree) -> None:
    tree["run"]["tokens"] = 65
    assert parse_run_config(tree).steps == 2


def test_the_seed_of_the_run_is_everybodys_who_has_none(tree: Tree) -> None:
    tree["saes"].append({**tree["saes"][0], "name": "own", "seed": 3})
    config = parse_run_config(tree)
    assert config.stream.seed == 11
    assert [one.settings["seed"] for one in config.saes] == [11, 3]
    tree["stream"]["seed"] = 5
    assert parse_run_config(tree).stream.seed == 5


def test_what_is_held_out_is_not_learnt_from(tree: Tree) -> None:
    tree["data"]["skip"] = 7
    tree["run"] |= {"evaluate": True, "heldout": 30}
    config = parse_run_config(tree)
    assert (config.training_data.skip, config.training_data.limit) == (37, 0)
    assert (config.heldout_data.skip, config.heldout_data.limit) == (7, 30)
    tree["run"]["evaluate"] = False
    assert parse_run_config(tree).training_data.skip == 7


@pytest.mark.parametrize(
    ("table", "key", "value", "said"),
    [
        ("run", "tokns", 5, "run.tokns: no such key (did you mean tokens?); there are out, tokens"),
        ("run", "tokens", 0, "run.tokens: Expected `int` >= 1"),
        ("run", "tokens", "many", "run.tokens: Expected `int`, got `str`"),
        ("stream", "batch", 0, "stream.batch: must be at least 1"),
        ("stream", "buffer", 64, "stream.buffer: must hold two batches"),
        ("stream", "packing", "loose", "stream.packing: must be one of packed, documents, got 'loose'"),
        ("stream", "context", [], "stream.context: Expected `int`, got `array`"),
        ("model", "dtype", "float16", "model.dtype: "),
        ("data", "kind", "scroll", "data.kind: "),
    ],
)
def test_names_the_key_and_what_is_allowed(tree: Tree, table: str, key: str, value: object, said: str) -> None:
    tree[table][key] = value
    with pytest.raises(BadConfig) as caught:
        parse_run_config(tree)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("table", "key"), [("model", "path"), ("data", "path"), ("run", "out"), ("run", "tokens")])
def test_says_what_must_be_given(tree: Tree, table: str, key: str) -> None:
    del tree[table][key]
    with pytest.raises(BadConfig, match=rf"^{table}\.{key}: must be given$"):
        parse_run_config(tree)


def test_refuses_unknown_tables_and_none(tree: Tree) -> None:
    with pytest.raises(BadConfig, match=r"^saess: no such key \(did you mean saes\?\)"):
        parse_run_config(tree | {"saess": []})
    with pytest.raises(BadConfig, match=r"^run: must be a table, got 3"):
        parse_run_config(tree | {"run": 3})
    with pytest.raises(BadConfig, match="at least one"):
        parse_run_config(tree | {"saes": []})


def test_refuses_one_name_twice(tree: Tree) -> None:
    tree["saes"] *= 2
    with pytest.raises(BadConfig, match="'mid' is given twice"):
        parse_run_config(tree)


def test_a_file_with_flags_on_top(tree: Tree, write: Callable[[Tree], Path]) -> None:
    config = load_run_config(write(tree), {"run": {"tokens": 64}, "model": {"device": "cpu"}})
    assert (config.steps, config.run.log_every) == (1, 10)
    assert config_as_json(config) == config_as_json(parse_run_config(tree | {"run": tree["run"] | {"tokens": 64}}))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="No such file"):
        load_run_config(tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("run = [", encoding="utf-8")
    with pytest.raises(BadConfig, match=r"broken\.toml: "):
        load_run_config(broken)


def test_differences_are_of_what_decides_the_outcome(tree: Tree) -> None:
    before = config_as_json(parse_run_config(deepcopy(tree)))
    assert differences(before, before) == []
    tree["run"] |= {"out": "elsewhere", "log_every": 1, "checkpoint_every": 3, "keep": 9, "threads": 2}
    assert differences(before, config_as_json(parse_run_config(tree))) == []
    tree["saes"][0]["k"] = 5
    tree["stream"]["batch"] = 32
    assert differences(before, config_as_json(parse_run_config(tree))) == [
        "saes.mid.settings.k was 4, now is 5",
        "stream.batch was 64, now is 32",
    ]
    tree["saes"][0]["name"] = "other"
    assert "saes.mid.settings.k was 4, now is not given" in differences(before, config_as_json(parse_run_config(tree)))
