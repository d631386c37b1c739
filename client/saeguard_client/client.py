"""The blocking client: sends what ``_api`` builds, hands back what its readers read."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from types import TracebackType
from typing import TypeVar

import grpc

from saeguard_client import api
from saeguard_client._method import method
from saeguard_client.calls import (
    DEFAULT_DEADLINE_S,
    DEFAULT_RETRIES,
    Bearer,
    ChannelOptions,
    Defaults,
    EitherCall,
    Endpoint,
    GatheredCall,
    PagedCall,
    StreamCall,
    StrPath,
    Tls,
    Token,
    UnaryCall,
    check_ready,
    endpoint,
)
from saeguard_client.errors import DeadlineExceeded, NotFound, Unavailable, from_call

T = TypeVar("T")
Whole = TypeVar("Whole")
Part = TypeVar("Part")


class Client:
    """A connection to a Saeguard server; threads may share it. Use it with ``with``, or call ``close``.

    Args:
        target: such as "localhost:50051" or "dns:///saeguard:50051"; calls are spread over all its addresses.
        channel: a ready channel instead of a target; it stays open when the client closes.
        root_certificates: path of a PEM file; TLS is used when this or a key is given.
        private_key: path of a PEM file, for servers that ask who calls; goes with ``certificate_chain``.
        api_key: "sg_...", for servers that want one; anybody on the way can read it where there is no TLS.
        token: a JSON Web Token instead; or a function that gives one for the next call, without waiting.
        deadline_s: for every call that does not say; None is no limit but the server's.
        retries: repetitions, 0 to 4, of a call that was refused as unavailable or overloaded before its first message.
        metadata: sent with every call.
        options: further gRPC channel options.

    Raises:
        ValueError: an argument makes no sense.
        OSError: a certificate cannot be read.
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        channel: grpc.Channel | None = None,
        root_certificates: StrPath | None = None,
        private_key: StrPath | None = None,
        certificate_chain: StrPath | None = None,
        api_key: str | None = None,
        token: Token | None = None,
        deadline_s: float | None = DEFAULT_DEADLINE_S,
        retries: int = DEFAULT_RETRIES,
        metadata: Mapping[str, str] | None = None,
        options: ChannelOptions = (),
    ) -> None:
        tls = Tls(root_certificates, private_key, certificate_chain)
        self._defaults = Defaults.of(deadline_s, metadata or {}, Bearer(api_key, token))
        self._is_ours = channel is None
        if channel is None:
            channel = _open(endpoint(target, tls, retries, options))
        else:
            check_ready(target, tls, options)
        self._channel = channel

    def close(self) -> None:
        """Ends running calls and the connection."""
        if self._is_ours:
            self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _unary(self, call: UnaryCall[T]) -> T:
        ask: grpc.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(call.method)
        timeout_s, metadata = self._defaults.of_call(call.options)
        rpc = ask.future(call.request, timeout=timeout_s, metadata=metadata)
        try:
            reply = rpc.result()
        except (grpc.RpcError, grpc.FutureCancelledError):
            raise from_call(rpc) from None
        finally:
            # Ctrl-C lands in result(): the server must not go on for nobody. After an answer this does nothing.
            rpc.cancel()
        return call.read(reply)

    def _stream(self, call: StreamCall[T]) -> Generator[T, None, None]:
        ask: grpc.UnaryStreamMultiCallable[bytes, bytes] = self._channel.unary_stream(call.method)
        timeout_s, metadata = self._defaults.of_call(call.options)
        rpc, reader = ask(call.request, timeout=timeout_s, metadata=metadata), call.reader()
        try:
            for message in rpc:
                yield reader.read(message)
        except grpc.RpcError:
            raise from_call(rpc) from None
        finally:
            rpc.cancel()
        reader.finish()

    def _whole(self, call: EitherCall[Whole, Part]) -> Whole:
        return self._unary(call.whole)

    def _parts(self, call: EitherCall[Whole, Part] | GatheredCall[Whole, Part]) -> Generator[Part, None, None]:
        return self._stream(call.parts)

    def _gathered(self, call: GatheredCall[Whole, Part]) -> Whole:
        return call.gather(self._stream(call.parts))

    def _paged(self, call: PagedCall[T]) -> Generator[T, None, None]:
        while (asked := call.next_call()) is not None:
            yield from call.accept(self._unary(asked))

    def _probe(self, call: UnaryCall[bool]) -> bool:
        try:
            return self._unary(call)
        except (Unavailable, DeadlineExceeded, NotFound):
            return False

    generate = method("generate", api.generate, _whole)
    generate_stream = method("generate_stream", api.generate, _parts)
    compare = method("compare", api.compare, _unary)
    activations = method("activations", api.activations, _gathered)
    activations_stream = method("activations_stream", api.activations, _parts)
    model = method("model", api.model, _unary)
    saes = method("saes", api.saes, _unary)
    feature = method("feature", api.feature, _unary)
    features = method("features", api.features, _paged)
    policies = method("policies", api.policies, _unary)
    apply_policies = method("apply_policies", api.apply_policies, _unary)
    delete_policy = method("delete_policy", api.delete_policy, _unary)
    activate_revision = method("activate_revision", api.activate_revision, _unary)
    rollback_policies = method("rollback_policies", api.rollback_policies, _unary)
    policy_history = method("policy_history", api.policy_history, _unary)
    info = method("info", api.info, _unary)
    healthy = method("healthy", api.healthy, _probe)


def _open(where: Endpoint) -> grpc.Channel:
    if where.credentials is None:
        return grpc.insecure_channel(where.target, where.options)
    return grpc.secure_channel(where.target, where.credentials, where.options)
