"""The asyncio client: ``client.Client`` with ``await``."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from types import TracebackType
from typing import TypeVar

import grpc
import grpc.aio

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


class AsyncClient:
    """A connection to a Saeguard server for asyncio. Use it with ``async with``, or ``await close()``.

    Takes what Client takes; the channel is opened by the first call, in that call's event loop.
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        channel: grpc.aio.Channel | None = None,
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
        self._endpoint = endpoint(target, tls, retries, options) if channel is None else None
        if channel is not None:
            check_ready(target, tls, options)
        self._channel = channel

    async def close(self) -> None:
        """Ends running calls and the connection."""
        if self._endpoint is not None and self._channel is not None:
            await self._channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _opened(self) -> grpc.aio.Channel:
        """Not in ``__init__``: a channel belongs to the event loop that runs when it is made."""
        if self._channel is None:
            assert self._endpoint is not None
            self._channel = _open(self._endpoint)
        return self._channel

    async def _unary(self, call: UnaryCall[T]) -> T:
        ask: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = self._opened().unary_unary(call.method)
        timeout_s, metadata = self._defaults.of_call(call.options)
        rpc = ask(call.request, timeout=timeout_s, metadata=metadata)
        try:
            reply = await rpc
        except grpc.aio.AioRpcError as err:
            raise from_call(err) from None
        return call.read(reply)

    async def _stream(self, call: StreamCall[T]) -> AsyncGenerator[T, None]:
        ask: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = self._opened().unary_stream(call.method)
        timeout_s, metadata = self._defaults.of_call(call.options)
        rpc, reader = ask(call.request, timeout=timeout_s, metadata=metadata), call.reader()
        try:
            async for message in rpc:
                yield reader.read(message)
        except grpc.aio.AioRpcError as err:
            raise from_call(err) from None
        finally:
            rpc.cancel()
        reader.finish()

    async def _whole(self, call: EitherCall[Whole, Part]) -> Whole:
        return await self._unary(call.whole)

    def _parts(self, call: EitherCall[Whole, Part] | GatheredCall[Whole, Part]) -> AsyncGenerator[Part, None]:
        return self._stream(call.parts)

    async def _gathered(self, call: GatheredCall[Whole, Part]) -> Whole:
        return call.gather([part async for part in self._stream(call.parts)])

    async def _paged(self, call: PagedCall[T]) -> AsyncGenerator[T, None]:
        while (asked := call.next_call()) is not None:
            for item in call.accept(await self._unary(asked)):
                yield item

    async def _probe(self, call: UnaryCall[bool]) -> bool:
        try:
            return await self._unary(call)
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


def _open(where: Endpoint) -> grpc.aio.Channel:
    if where.credentials is None:
        return grpc.aio.insecure_channel(where.target, where.options)
    return grpc.aio.secure_channel(where.target, where.credentials, where.options)
