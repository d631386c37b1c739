"""What must not drift: the two clients, what an editor shows of them, the exported names, the imports."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import jedi
import pytest

import saeguard_client
from saeguard.requests import GenerateRequest, Sampling
from saeguard.types import KINDS
from saeguard_client import AsyncClient, Client

ROOT = Path(__file__).resolve().parents[2]


def public_methods(cls: type) -> dict[str, Any]:
    return {name: value for name, value in vars(cls).items() if not name.startswith("_")}


def blocking(annotation: str) -> str:
    """An asyncio method's annotation, as the blocking method has it."""
    if not annotation.startswith("AsyncGenerator["):
        return annotation
    return annotation.removeprefix("Async").removesuffix("]") + ", None]"


def test_both_clients_have_the_same_methods() -> None:
    sync, asynchronous = public_methods(Client), public_methods(AsyncClient)
    assert {"generate", "generate_stream", "activations", "features", "close"} <= sync.keys()
    assert list(sync) == list(asynchronous)
    for name in sync:
        ours, theirs = inspect.signature(sync[name]), inspect.signature(asynchronous[name])
        assert ours.parameters == theirs.parameters, name
        assert ours.return_annotation == blocking(theirs.return_annotation), name
        assert_documented(name, sync[name].__doc__, asynchronous[name].__doc__)
        is_stream = theirs.return_annotation.startswith("AsyncGenerator[")
        assert inspect.iscoroutinefunction(asynchronous[name]) is not is_stream, name


def assert_documented(name: str, full: str, brief: str) -> None:
    """The blocking method says everything; its twin says in one line what it does, and where the rest stands."""
    assert brief == full if "\n" not in full else "\n" not in brief and f"``Client.{name}``" in brief, name


def test_constructors_differ_in_the_channel_only() -> None:
    def settings(cls: type) -> dict[str, Any]:
        parameters = inspect.signature(cls).parameters
        return {name: (p.kind, p.default) for name, p in parameters.items()}

    assert settings(Client) == settings(AsyncClient)


def test_a_generation_takes_every_field_of_its_request() -> None:
    arguments = inspect.signature(Client.generate).parameters
    assert inspect.signature(Client.generate_stream).parameters == arguments
    assert list(arguments)[:3] == ["self", "input", "steer"]
    fields = {*inspect.signature(Sampling).parameters, *inspect.signature(GenerateRequest).parameters}
    assert fields - {"sampling", "interventions"} == arguments.keys() - {
        "self", "steer", "check_receipt", "deadline_s", "request_id",
    }  # fmt: skip
    assert inspect.signature(Client.compare).parameters.items() <= arguments.items()


@pytest.fixture
def editor(tmp_path: Path, monkeypatch: Any) -> Any:
    """Opens a program as an editor does that reads source and runs nothing."""
    monkeypatch.setattr(jedi.settings, "cache_directory", str(tmp_path))
    project = jedi.Project(ROOT, added_sys_path=[str(ROOT / "proto"), str(ROOT / "client")])

    def opened(program: str) -> jedi.Script:
        start = "from saeguard_client import AsyncClient, Client\nclient, remote = Client('h:1'), AsyncClient('h:1')\n"
        return jedi.Script(start + program, project=project, environment=jedi.InterpreterEnvironment())

    return opened


@pytest.mark.parametrize("client", ["client", "remote"])
@pytest.mark.parametrize(
    ("method", "parameters", "doc"),
    [
        ("generate", "input: Input, *, steer: Iterable[Intervention]=(), max_new_tokens:", "temperature: 0 is greedy"),
        ("generate_stream", "input: Input, *, steer: Iterable[Intervention]=(),", "the text as it is made"),
        ("compare", "input: Input, *, steer: Iterable[Intervention]=(),", "Needs the role policy-write"),
        ("activations", "inputs: str | Sequence[Input], saes: Iterable[str]=(), *, top_k:", "a lone string is one"),
        ("feature", "sae: str, index: int, *, deadline_s: float | None=None,", "NotFound: there is no such SAE"),
        ("apply_policies", "documents: Mapping[str, str], *, etag: str=", "Aborted: there is a newer revision"),
    ],
)
def test_an_editor_shows_signature_and_docs(editor: Any, client: str, method: str, parameters: str, doc: str) -> None:
    (signature,) = editor(f"{client}.{method}(").get_signatures()
    assert signature.to_string().startswith(f"{method}({parameters}")
    assert (doc if client == "client" else f"``Client.{method}``") in signature.docstring()


@pytest.mark.parametrize(
    ("program", "result"),
    [
        ("result = client.generate('x')", "Completion"),
        ("for result in client.generate_stream('x'): pass", "StreamChunk"),
        ("result = client.generate('x').usage", "Usage"),
        ("result = client.compare('x').steered", "Completion"),
        ("result = client.activations('x', top_k=1)[0]", "Activations"),
        ("result = client.feature('a', 1)", "Feature"),
        ("result = client.apply_policies({})", "PolicyChange"),
        ("async def run():\n    result = await remote.generate('x')\n    result", "Completion"),
        ("async def run():\n    async for result in remote.generate_stream('x'):\n        result", "StreamChunk"),
    ],
)
def test_an_editor_shows_the_result(editor: Any, program: str, result: str) -> None:
    if "async" not in program:
        program += "\nresult"
    (value,) = editor(program).infer(*end_of(program))
    assert value.name == result


def end_of(program: str) -> tuple[int, int]:
    """Line and column, after the two lines that the editor has before."""
    lines = program.splitlines()
    return len(lines) + 2, len(lines[-1])


def test_all_is_complete_sorted_and_importable() -> None:
    exported = saeguard_client.__all__
    assert len(exported) > 30
    assert exported == sorted(exported)
    for name in exported:
        getattr(saeguard_client, name)
    modules = [sys.modules[name] for name in ("saeguard_client.errors", "saeguard.results", "saeguard.catalog")]
    public = {
        name
        for module in modules
        for name, value in vars(module).items()
        if inspect.isclass(value) and value.__module__ == module.__name__ and not name.startswith("_")
    }
    assert public - {"FeaturePage"} <= set(exported)
    assert {kind.__name__ for kind in KINDS.values()} <= set(exported)


@pytest.mark.parametrize("module", ["saeguard_client", "saeguard_client.cli"])
def test_importing_takes_neither_torch_nor_numpy_nor_the_server(module: str) -> None:
    code = f"import sys, {module}; print(*(n for n in ('torch', 'numpy', 'saeguard_server') if n in sys.modules))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("", "")
