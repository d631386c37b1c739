"""SAEs from the hub: real downloads from a stand-in on this machine, from the cache alone, and every way it fails."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from saeguard_sae import hub, releases
from saeguard_sae.formats.parsed import SaeOrigin
from saeguard_sae.hub import HubError, HubSae
from support.hub import FakeHub, serving

REPO = "org/saes"
FILES = {
    "README.md": b"#",
    "layer_3/cfg.json": b"{}",
    "layer_3/sae_weights.safetensors": b"three" * 1000,
    "layer_3/activation_whitening.safetensors": b"white",
    "layer_3/sparsity.safetensors": b"sparse",
    "layer_3/dashboard.html": b"<html>",
    "layer_3/old/sae_weights.safetensors": b"old",
    "layer_4/cfg.json": b"{}",
    "layer_4/sae_weights.safetensors": b"four",
}


@pytest.fixture
def up() -> Iterator[FakeHub]:
    with serving() as served:
        yield served


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def resolve(up: FakeHub, cache: Path, path: str, **more: Any) -> HubSae:
    return hub.resolve_hub_sae(path, cache_dir=cache, endpoint=up.endpoint, **more)


def held(resolved: HubSae) -> set[str]:
    return {one.relative_to(resolved.path).as_posix() for one in resolved.path.rglob("*") if one.is_file()}


def test_a_folder_is_downloaded_and_nothing_else_of_the_repository(up: FakeHub, cache: Path) -> None:
    commit = up.publish(REPO, FILES)
    found = resolve(up, cache, "hf://org/saes/layer_3")
    assert held(found) == {"cfg.json", "sae_weights.safetensors", "activation_whitening.safetensors"}
    assert (found.path / "sae_weights.safetensors").read_bytes() == b"three" * 1000
    assert found.path == cache / "models--org--saes" / "snapshots" / commit / "layer_3"
    assert (found.origin, found.revision, found.offline) == (SaeOrigin(REPO, "layer_3"), commit, None)
    assert {name.partition("/")[0] for name in up.downloads()} == {"layer_3"}


def test_a_branch_is_not_pinned_and_its_commit_is(up: FakeHub, cache: Path) -> None:
    first = up.publish(REPO, FILES)
    assert not resolve(up, cache, "hf://org/saes/layer_4").is_pinned
    second = up.publish(REPO, FILES | {"layer_4/sae_weights.safetensors": b"newer"})
    newer = resolve(up, cache, "hf://org/saes/layer_4")
    assert (newer.revision, (newer.path / "sae_weights.safetensors").read_bytes()) == (second, b"newer")
    older = resolve(up, cache, f"hf://org/saes/layer_4@{first}")
    assert (older.revision, older.is_pinned) == (first, True)
    assert (older.path / "sae_weights.safetensors").read_bytes() == b"four"
    assert resolve(up, cache, "hf://org/saes/layer_4", revision=first) == older


def test_other_branches_and_tags(up: FakeHub, cache: Path) -> None:
    up.publish(REPO, FILES)
    commit = up.publish(REPO, {"sae.safetensors": b"pr", "cfg.json": b"{}"}, branch="refs/pr/1")
    found = resolve(up, cache, "hf://org/saes@refs/pr/1")
    assert (found.revision, found.origin) == (commit, SaeOrigin(REPO, ""))
    assert held(found) == {"sae.safetensors", "cfg.json"}


def test_what_is_there_is_not_downloaded_again(up: FakeHub, cache: Path) -> None:
    up.publish(REPO, FILES)
    first = resolve(up, cache, "hf://org/saes/layer_3")
    up.asked.clear()
    assert resolve(up, cache, "hf://org/saes/layer_3") == first
    assert [method for method, _, _ in up.asked] == ["GET"]  # which commit main is now


def test_a_download_that_is_cut_off_goes_on_where_it_was(
    up: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    up.publish(REPO, FILES)
    up.cut = {"layer_3/sae_weights.safetensors"}
    found = resolve(up, cache, "hf://org/saes/layer_3")
    assert (found.path / "sae_weights.safetensors").read_bytes() == b"three" * 1000
    weights = f"/org/saes/resolve/{found.revision}/layer_3/sae_weights.safetensors"
    assert [ranged for method, path, ranged in up.asked if (method, path) == ("GET", weights)] == [None, "bytes=2000-"]


def test_progress_shows_on_a_terminal_alone(up: FakeHub, cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    up.publish(REPO, FILES)
    resolve(up, cache, "hf://org/saes/layer_3")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("files", "inside", "needed"),
    [
        (
            {"layer_7.safetensors", "layer_8.safetensors", "config.yaml", "features/7.json"},
            "layer_7.safetensors",
            {"layer_7.safetensors", "config.yaml"},
        ),
        (
            {"W_enc_3.safetensors", "W_dec_3.safetensors", "W_enc_4.safetensors", "W_dec_4.safetensors", "config.yaml"},
            "W_enc_3.safetensors",
            {"W_enc_3.safetensors", "W_dec_3.safetensors", "config.yaml"},
        ),
        (
            {"clt/a/params_layer_3.safetensors", "clt/a/params_layer_4.safetensors", "clt/a/config.json", "x.json"},
            "clt/a/params_layer_4.safetensors",
            {"clt/a/params_layer_4.safetensors", "clt/a/config.json"},
        ),
        (
            {"L15R/hyperparams.json", "L15R/lm_config.json", "L15R/checkpoints/final.safetensors", "L16R/x.json"},
            "L15R",
            {"L15R/hyperparams.json", "L15R/lm_config.json", "L15R/checkpoints/final.safetensors"},
        ),
        ({"w_v9.pt", "w_v9_cfg.json", "v_v9.pt"}, "w_v9.pt", {"w_v9.pt", "w_v9_cfg.json"}),
        ({"a/x.pt", "a/.gitattributes", "b/y.pt"}, "a", {"a/x.pt"}),
        ({"a/W_enc_0.safetensors", "a/W_dec_0.safetensors"}, "a", {"a/W_enc_0.safetensors", "a/W_dec_0.safetensors"}),
        (
            {"t/conf.yaml", "t/latest_ckpt.safetensors", "t/ckpt_1.safetensors"},
            "t",
            {"t/conf.yaml", "t/latest_ckpt.safetensors"},
        ),
    ],
)
def test_what_belongs_to_one_sae(files: set[str], inside: str, needed: set[str], up: FakeHub, cache: Path) -> None:
    up.publish(REPO, {name: name.encode() for name in files})
    found = resolve(up, cache, f"hf://org/saes/{inside}")
    assert set(up.downloads()) == needed
    assert found.path.exists()
    assert found.origin == SaeOrigin(REPO, inside)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        (
            "hf://org/saes",
            r"hf://org/saes: holds several SAEs: name one of its 3 folders, such as layer_3, layer_4, set",
        ),
        ("hf://org/saes/layer_5", r"no such file or folder in the repository; close are layer_4, layer_3"),
        ("hf://org/saes/x", r"no such file or folder in the repository$"),
        ("hf://org/saes/docs", r"hf://org/saes/docs: holds no weights of an SAE"),
        ("hf://org/saes/set", r"holds several SAEs: name one of its 2 files, such as set/layer_0.safetensors"),
        ("hf://org/other/layer_3", r"there is no repository org/other, or it is private: check the name, or log in"),
        ("hf://org/saes/layer_3@nowhere", r"org/saes has no revision 'nowhere'"),
        ("hf://org/saes/layer_3@../../x", r"'../../x' is not a revision"),
        ("hf://org", r"write it like hf://org/name/path/in/repo@revision"),
        ("hf://org//layer_3", r"write it like hf://"),
        ("hf://org/saes/../x", r"write it like hf://"),
        ("hf://org/sa--es/x", r"hf://org/sa--es/x: "),
    ],
)
def test_what_cannot_be_had_is_explained(path: str, says: str, up: FakeHub, cache: Path) -> None:
    files = {name: content for name, content in FILES.items() if "old" not in name}
    up.publish(REPO, files | {"docs/a.json": b"{}", "set/layer_0.safetensors": b"", "set/layer_1.safetensors": b""})
    with pytest.raises(HubError, match=says):
        resolve(up, cache, path)


def test_two_revisions_are_one_too_many(up: FakeHub, cache: Path) -> None:
    with pytest.raises(HubError, match=r"hf://org/saes@a: its revision is said to be b too"):
        resolve(up, cache, "hf://org/saes@a", revision="b")


def test_a_gated_repository_says_how_to_get_in(up: FakeHub, cache: Path) -> None:
    up.publish(REPO, FILES)
    up.repos[REPO].is_gated = True
    with pytest.raises(HubError, match=r"let you in: ask at https://huggingface.co/org/saes, then log in"):
        resolve(up, cache, "hf://org/saes/layer_3")


def test_the_cache_alone(up: FakeHub, cache: Path) -> None:
    up.publish(REPO, FILES)
    online = resolve(up, cache, "hf://org/saes/layer_3")
    up.asked.clear()
    offline = resolve(up, cache, "hf://org/saes/layer_3", local_files_only=True)
    assert (offline.path, offline.revision, offline.origin) == (online.path, online.revision, online.origin)
    assert offline.offline == "local_files_only is set"
    assert resolve(up, cache, f"hf://org/saes/layer_3@{online.revision}", local_files_only=True).is_pinned
    assert not up.asked


def test_huggingface_hubs_own_offline_switch(up: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    up.publish(REPO, FILES)
    online = resolve(up, cache, "hf://org/saes/layer_3")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    up.asked.clear()
    offline = resolve(up, cache, "hf://org/saes/layer_3")
    assert offline.path == online.path
    assert "offline mode is enabled" in (offline.offline or "")
    with pytest.raises(HubError, match=r"nothing of main is there; only the cache .* was looked at: .*offline mode"):
        resolve(up, cache, "hf://org/never/layer_3")
    assert not up.asked


def test_a_hub_that_is_down_leaves_what_is_in_the_cache(up: FakeHub, cache: Path) -> None:
    up.publish(REPO, FILES)
    online = resolve(up, cache, "hf://org/saes/layer_3")
    up.is_down = True
    assert resolve(up, cache, "hf://org/saes/layer_3").path == online.path
    with pytest.raises(HubError, match=r"no such file or folder in the repository; close are layer_3; only the cache"):
        resolve(up, cache, "hf://org/saes/layer_4")
    with pytest.raises(
        HubError, match=r"hf://org/never: nothing of main is there; only the cache .* was looked at: .*503"
    ):
        resolve(up, cache, "hf://org/never")


def test_no_network_at_all(cache: Path) -> None:
    with pytest.raises(HubError, match=r"nothing of main is there; only the cache .* was looked at: ConnectError"):
        hub.resolve_hub_sae("hf://org/saes/layer_3", cache_dir=cache, endpoint="http://127.0.0.1:9")


def test_a_download_that_was_given_up_is_not_taken_for_whole(up: FakeHub, cache: Path) -> None:
    up.publish(REPO, FILES)
    found = resolve(up, cache, "hf://org/saes/layer_3")
    (found.path / "sae_weights.safetensors").unlink()
    with pytest.raises(HubError, match=r"layer_3: holds no weights of an SAE; only the cache .* was looked at"):
        resolve(up, cache, "hf://org/saes/layer_3", local_files_only=True)


def test_a_cache_that_cannot_be_written_still_serves(up: FakeHub, cache: Path) -> None:
    up.publish(REPO, FILES)
    resolve(up, cache, "hf://org/saes/layer_3")
    (cache / "models--org--saes" / "refs" / "main").unlink()
    (cache / "models--org--saes" / "refs").rmdir()
    (cache / "models--org--saes" / "refs").write_text("in the way")
    assert resolve(up, cache, "hf://org/saes/layer_3").path.is_dir()


def test_a_path_on_this_machine_stays_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2-small-res-jb" / "blocks.0.hook_resid_pre").mkdir(parents=True)
    found = hub.resolve_hub_sae("gpt2-small-res-jb/blocks.0.hook_resid_pre")
    assert found == HubSae(path=Path("gpt2-small-res-jb/blocks.0.hook_resid_pre"))
    with pytest.raises(HubError, match="is on this machine, so it has no revision main"):
        hub.resolve_hub_sae("gpt2-small-res-jb", revision="main")


@pytest.mark.parametrize(("inside", "repo"), [("layer_3", "org/na-me"), ("", "org/na-me"), ("a/b.pt", "gpt2")])
def test_a_path_inside_the_hubs_cache_says_where_it_came_from(inside: str, repo: str, tmp_path: Path) -> None:
    path = tmp_path / f"models--{repo.replace('/', '--')}" / "snapshots" / ("0123456789" * 4) / inside
    path.mkdir(parents=True)
    found = hub.resolve_hub_sae(str(path))
    assert found == HubSae(path=path, origin=SaeOrigin(repo, inside), revision="0123456789" * 4)


def test_a_file_that_is_a_link_in_the_hubs_cache_says_so_too(up: FakeHub, cache: Path) -> None:
    commit = up.publish(REPO, FILES)
    file = resolve(up, cache, "hf://org/saes/layer_4").path / "sae_weights.safetensors"
    assert file.is_symlink()
    again = hub.resolve_hub_sae(str(file))
    assert (again.path, again.origin, again.revision) == (
        file,
        SaeOrigin(REPO, "layer_4/sae_weights.safetensors"),
        commit,
    )


def test_an_sae_of_a_release(up: FakeHub, cache: Path) -> None:
    repo, folder = "tommmcgrath/gpt2-small-mlp-out-saes", "sae_group_gpt2_blocks.0.hook_mlp_out_24576:v1"
    commit = up.publish(repo, {f"{folder}/cfg.json": b"{}", f"{folder}/sae_weights.safetensors": b"w"})
    found = resolve(up, cache, "gpt2-small-mlp-tm/blocks.0.hook_mlp_out")
    assert found.published == releases.find_release("gpt2-small-mlp-tm", "blocks.0.hook_mlp_out")
    assert (found.origin, found.revision) == (SaeOrigin(repo, folder), commit)
    assert held(found) == {"cfg.json", "sae_weights.safetensors"}
    by_place = resolve(up, cache, f"hf://{repo}/{folder}")
    assert by_place == found
    assert hub.resolve_hub_sae(str(found.path)).published == found.published
    pinned = resolve(up, cache, f"gpt2-small-mlp-tm/blocks.0.hook_mlp_out@{commit}")
    assert (pinned.is_pinned, pinned.path) == (True, found.path)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("gpt2-small-res/blocks.0.hook_resid_pre", r"no release is called 'gpt2-small-res'; close are gpt2-small-res"),
        ("gpt2-small-res-jb/blocks.0.hook_resid", r"has no SAE 'blocks.0.hook_resid', but 13 others, such as blocks.0"),
        (
            "saes/mine",
            r"saes/mine: no such file or folder here, and no release is called 'saes'.*written hf://org/name",
        ),
        ("", r"an empty path: no such file or folder here"),
    ],
)
def test_names_that_lead_nowhere(path: str, says: str) -> None:
    with pytest.raises(HubError, match=says):
        hub.resolve_hub_sae(path)
