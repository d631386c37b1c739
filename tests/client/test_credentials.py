"""Who calls, as the client says it: keys and tokens, from arguments, files and the environment; never in a message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2 as details

from saeguard_client import AsyncClient, Client, PermissionDenied, Unauthenticated
from saeguard_client.calls import Defaults
from saeguard_client.cli import main

KEY = "sg_0123456789abcdef_Xyzzy-7421"


def sent(server: Any) -> list[str | None]:
    return [call.metadata.get("authorization") for call in server.seen]


def test_a_key_or_a_token_goes_with_every_call(server: Any, open_shell: Any, whole_reply: Any) -> None:
    server.on("Generate", whole_reply)
    open_shell(api_key=KEY).call("generate", "x")
    open_shell(token="a.b.c").call("generate", "x")
    open_shell().call("generate", "x", request_id="mine")
    open_shell(api_key=KEY).call("generate", "x", request_id="mine")
    assert sent(server) == [f"Bearer {KEY}", "Bearer a.b.c", None, f"Bearer {KEY}"]


def test_a_function_gives_each_call_its_token(server: Any, open_shell: Any, whole_reply: Any) -> None:
    server.on("Generate", whole_reply)
    tokens = iter(["one", "two", "with a blank"])
    shell = open_shell(token=lambda: next(tokens))
    for _ in range(2):
        shell.call("generate", "x")
    assert sent(server) == ["Bearer one", "Bearer two"]
    with pytest.raises(ValueError, match="token: must be printable ASCII without blanks"):
        shell.call("generate", "x")


@pytest.mark.parametrize("client", [Client, AsyncClient])
@pytest.mark.parametrize(
    ("credentials", "problem"),
    [
        ({"api_key": KEY, "token": "a.b.c"}, "api_key: the server takes one credential"),
        ({"api_key": KEY, "metadata": {"Authorization": "Bearer x"}}, "the server takes one credential"),
        ({"api_key": f"{KEY}\n"}, "api_key: must be printable ASCII without blanks"),
        ({"api_key": ""}, "api_key: must be printable"),
        ({"token": f"{KEY}é"}, "token: must be printable"),
        ({"token": 3}, "token: must be printable"),
    ],
)
def test_what_cannot_be_sent_is_refused_and_not_quoted(client: Any, credentials: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as caught:
        client("localhost:1", **credentials)
    assert "Xyzzy" not in str(caught.value)


def test_credentials_do_not_print() -> None:
    assert "Xyzzy" not in repr(Defaults.of(None, {}, KEY, None))


@pytest.mark.parametrize(
    ("code", "kind", "facts"),
    [
        (grpc.StatusCode.UNAUTHENTICATED, Unauthenticated, {}),
        (grpc.StatusCode.PERMISSION_DENIED, PermissionDenied, {"role": "steer"}),
    ],
)
def test_refusals_have_their_exceptions(server: Any, open_shell: Any, code: Any, kind: Any, facts: Any) -> None:
    info = details.ErrorInfo(reason=code.name, domain="saeguard.v1", metadata=facts)
    server.on("Generate", lambda request, context: server.refuse(context, code, "no", info))
    with pytest.raises(kind) as caught:
        open_shell().call("generate", "x")
    assert (caught.value.reason, caught.value.metadata) == (code.name, facts)
    assert len(server.seen) == 1, "asking again would not help"


@pytest.fixture
def environment(monkeypatch: Any, server: Any) -> Any:
    for name in ("API_KEY", "TOKEN", "TLS_CA", "TLS_CERT", "TLS_KEY"):
        monkeypatch.delenv(f"SAEGUARD_{name}", raising=False)
    monkeypatch.setenv("SAEGUARD_TARGET", server.target)
    return monkeypatch


@pytest.mark.parametrize("flag", ["--api-key-file", "--token-file"])
def test_files_and_the_environment(
    server: Any, environment: Any, stream_replies: Any, tmp_path: Path, flag: str
) -> None:
    server.on("GenerateStream", stream_replies)
    file = tmp_path / "secret"
    file.write_text("from-a-file\n")
    assert main(["generate", "x", flag, str(file)]) == 0
    environment.setenv("SAEGUARD_API_KEY" if flag == "--api-key-file" else "SAEGUARD_TOKEN", "from-the-environment")
    assert main(["generate", "x"]) == 0
    assert main([flag, str(file), "generate", "x"]) == 0
    assert sent(server) == ["Bearer from-a-file", "Bearer from-the-environment", "Bearer from-a-file"]


def test_wrong_usage(environment: Any, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "secret"
    file.write_text(f"{KEY} {KEY}")
    for arguments, problem in (
        (["--api-key-file", str(tmp_path / "none")], "No such file"),
        (["--api-key-file", str(file)], "api_key: must be printable ASCII without blanks"),
        (["--api-key-file", str(file), "--token-file", str(file)], "one credential"),
    ):
        assert main(["info", *arguments]) == 2
        err = capsys.readouterr().err
        assert problem in err
        assert "Xyzzy" not in err


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["TLS_CA"], "none-TLS_CA: No such file"),
        (["TLS_CERT"], "goes together with certificate_chain"),
        (["TLS_KEY", "TLS_CERT"], "none-TLS_KEY: No such file"),
    ],
)
def test_certificates_may_come_from_the_environment(
    environment: Any, capsys: Any, names: list[str], problem: str
) -> None:
    for name in names:
        environment.setenv(f"SAEGUARD_{name}", f"none-{name}")
    assert main(["info"]) == 2
    assert problem in capsys.readouterr().err


def test_the_command_line_says_how_to_show_who_one_is(server: Any, environment: Any, capsys: Any) -> None:
    server.on("GetServerInfo", lambda _, context: server.refuse(context, grpc.StatusCode.UNAUTHENTICATED, "who calls?"))
    assert main(["info"]) == 1
    assert capsys.readouterr().err == (
        "saeguard: who calls?; show who you are with --api-key-file, --token-file or --tls-cert\n"
    )
