"""Three servers behind a client that knows all of them: none is missed, whether it is told to stop or killed."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from saeguard_client import Clamp, Client, SaeguardError
from support.server_process import ServerProcess

CALLERS = 6
REQUEST: dict[str, Any] = {
    "input": "In the morning, the old",
    "steer": [Clamp("resid4", 3, 0.4, unit="max")],
    "max_new_tokens": 12,
    "seed": 9_907,
}


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[ServerProcess]]:
    folder = tmp_path_factory.mktemp("rolling")
    servers = [ServerProcess(folder, {"server": {"drain_delay_s": 1.0}}) for _ in range(3)]
    try:
        for server in servers:
            server.start(until_serving=False)
        for server in servers:
            server.wait_until_serving()
        yield servers
    finally:
        for server in servers:
            if server.process is not None and server.process.poll() is None:
                server.process.kill()
                server.process.wait(10)


class Traffic:
    """Callers of whole answers, and of streams, until ``stop``."""

    def __init__(self, address: str) -> None:
        self._client = Client(address, retries=4)
        self._is_over, self._lock = threading.Event(), threading.Lock()
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self.expected = self._whole()
        self._pool = ThreadPoolExecutor(CALLERS)
        calls = (self._whole, self._streamed)
        self._callers = [self._pool.submit(self._call, calls[number % 2]) for number in range(CALLERS)]

    def stop(self) -> None:
        self._is_over.set()
        for caller in self._callers:
            caller.result(60)
        self._pool.shutdown()
        self._client.close()

    def _whole(self) -> list[int]:
        return [token.id for token in self._client.generate(**REQUEST).tokens]

    def _streamed(self) -> list[int]:
        ids: list[int] = []
        try:
            for chunk in self._client.generate_stream(**REQUEST):
                ids += [token.id for token in chunk.tokens]
        except SaeguardError:
            if not ids:
                raise
            # gRPC repeats no call whose answer has begun: this one was cut in the middle, and its caller was told.
            with self._lock:
                self.counts["cut in the middle"] += 1
            return self.expected
        return ids

    def _call(self, ask: Callable[[], list[int]]) -> None:
        while not self._is_over.is_set():
            try:
                ids = ask()
                problem = None if ids == self.expected else f"other tokens: {ids}"
            except SaeguardError as err:
                problem = f"{ask.__name__}: {type(err).__name__}: {err}"
            with self._lock:
                self.counts["answered" if problem is None else "failed"] += 1
                self.failures += [problem] if problem else []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_request_that_is_not_answered_fails(
    number: signal.Signals, servers: list[ServerProcess], is_full: bool, outcome: Callable[..., None]
) -> None:
    traffic = Traffic("ipv4:" + ",".join(server.address for server in servers))
    for server in servers if is_full else servers[:1]:
        code = server.stop(number)
        assert code == (0 if number == signal.SIGTERM else -number)
        time.sleep(1.0)
        server.start()
    time.sleep(2.0)
    traffic.stop()
    assert not traffic.failures, traffic.failures[:5]
    assert traffic.counts["answered"] > 20
    if number == signal.SIGTERM:
        assert not traffic.counts["cut in the middle"]
    outcome(
        f"{'each of' if is_full else 'one of'} three servers gets {number.name}, {CALLERS} callers",
        "no request that is not answered yet fails",
        ", ".join(f"{count} {name}" for name, count in traffic.counts.items()),
    )
