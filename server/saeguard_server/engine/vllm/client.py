"""vLLM as the engine sees it: launched, asked for a generation and for what its workers did."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import Any

import msgspec

from saeguard_server.engine.vllm.output import merge_outputs
from saeguard_server.engine.vllm.worker_messages import WorkerOutput
from saeguard_server.errors import InternalFailure
from saeguard_server.observe import Metrics

STOP_S = 2.0
_EXTENSION = "saeguard_server.engine.vllm.plugin.Extension"


class EngineDied(Exception):
    """vLLM's own process ended or failed."""


class VllmClient:
    """One vLLM engine. Launching it waits until the model is loaded.

    Args:
        arguments: of vLLM's engine, beyond those that are always ours.
        metrics: of what only vLLM's scheduler sees.

    Raises:
        RuntimeError: vLLM could not start; its log says why.
    """

    def __init__(self, arguments: Mapping[str, Any], metrics: Metrics) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self._load = _Load(metrics)
        self._llm: Any = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                skip_tokenizer_init=True,
                generation_config="vllm",
                worker_extension_cls=_EXTENSION,
                # A pass more than a request needs would edit tokens that nobody asked for.
                async_scheduling=False,
                disable_log_stats=True,
                **arguments,
            ),
            stat_loggers=[self._load],
        )

    @property
    def waiting(self) -> int:
        """Requests that wait, as of the last pass."""
        return self._load.waiting

    @property
    def is_dead(self) -> bool:
        """Whether it can take no more requests."""
        return bool(self._llm.errored)

    async def generate(
        self, prompt: Mapping[str, Any], sampling: Mapping[str, Any], request: str
    ) -> AsyncGenerator[Any]:
        """vLLM's outputs as they come; closing the iterator ends the request.

        Raises:
            EngineDied: it did, meanwhile.
        """
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        from vllm import SamplingParams

        params = SamplingParams(output_kind=RequestOutputKind.DELTA, **sampling)
        outputs = self._llm.generate(dict(prompt), params, request)
        try:
            async for output in outputs:
                yield output
        except (EngineDeadError, EngineGenerateError) as err:
            raise EngineDied from err
        finally:
            await outputs.aclose()

    async def worker_output(self, uid: int, tokens: int) -> WorkerOutput:
        """What the workers did for a request while they read its first ``tokens`` tokens.

        Raises:
            InternalFailure: a worker has a problem.
            EngineDied: vLLM did, meanwhile.
        """
        try:
            outputs: list[bytes] = await self._llm.collective_rpc("saeguard_output", args=(uid, tokens))
        except Exception as err:
            if self.is_dead:
                raise EngineDied from err
            raise InternalFailure("vLLM's workers failed on this request") from err
        return merge_outputs(msgspec.msgpack.decode(output, type=WorkerOutput) for output in outputs)

    def shut_down(self) -> None:
        """Ends its processes, by force after ``STOP_S``. What still waits for them waits for ever."""
        self._llm.shutdown(timeout=STOP_S)

    def close(self) -> None:
        """Frees what it held in this process; on the event loop, a turn after ``shut_down``."""
        # vLLM closes its sockets on the loop, and forgets the context, with two threads, that they were in.
        self._llm.engine_core.resources.ctx.destroy(linger=0)
        del self._llm


class _Load:
    """Takes part in vLLM's statistics, for the number of requests that wait; its own factory. What it leaves empty is
    a part of vLLM's interface."""

    def __init__(self, metrics: Metrics) -> None:
        self.waiting = 0
        self._metrics = metrics

    def __call__(self, *_: Any) -> _Load:
        return self

    def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
        """After every pass."""
        if scheduler_stats is not None:
            self.waiting = scheduler_stats.num_waiting_reqs
            self._metrics.steps.inc()
        if iteration_stats is not None:
            self._metrics.preemptions.inc(iteration_stats.num_preempted_reqs)

    def log_engine_initialized(self) -> None: ...

    def log(self) -> None: ...

    def record_sleep_state(self, *_: Any) -> None: ...
