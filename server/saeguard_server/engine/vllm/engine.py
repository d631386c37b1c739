"""The engine as the server sees it, while vLLM's processes run the model; lives on the event loop alone."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import Any

from saeguard_sae.edits import KINDS
from saeguard_sae.loading import LoadedSae
from saeguard_sae.models import Site
from saeguard_server.engine.backoff import Backoff
from saeguard_server.engine.model_files import ModelFiles
from saeguard_server.engine.protocol import Capabilities, GenerateTask, InspectTask, ModelInfo
from saeguard_server.engine.receipts import receipt
from saeguard_server.engine.text import Assembler
from saeguard_server.engine.tokenizer import Tokenizer
from saeguard_server.engine.vllm import asking, orders
from saeguard_server.engine.vllm.answering import Answer, activations, counts_of
from saeguard_server.engine.vllm.client import Client, Died
from saeguard_server.errors import DeadlineExceeded, Unavailable
from saeguard_server.observe.metrics import Metrics
from saeguard_server.reply import ActivationPart, Chunk

_log = logging.getLogger(__name__)

NAME = "vllm"
_RETRY_S = 1.0


class VllmEngine:
    """vLLM with our ops in its model.

    Greedy tokens are those of the transformers engine; sampled ones are not, as vLLM draws other random numbers.

    Args:
        saes: in the order of the settings.
        launch: starts vLLM; called again, on a thread, when it died.
        sites: where the model can be read and edited.
    """

    def __init__(
        self,
        model: ModelFiles,
        saes: Mapping[str, LoadedSae],
        client: Client,
        launch: Callable[[], Client],
        sites: frozenset[Site],
        metrics: Metrics,
        slots: int,
    ) -> None:
        self._model, self._saes, self._names = model, saes, tuple(saes)
        self._client: Client | None = client
        self._launch, self._metrics, self._slots = launch, metrics, slots
        self._backoff = Backoff()
        self._uids = itertools.count()
        self._running = 0
        self._is_started = self._is_warm = False
        self._limits: set[asyncio.Timeout] = set()
        """Of everything that waits for vLLM, which says nothing when it is stopped."""
        self._warming: asyncio.Task[None] | None = None
        self._revival: asyncio.Task[None] | None = None
        self._capabilities = Capabilities(NAME, sites, frozenset(KINDS))

    @property
    def model(self) -> ModelInfo:
        """The served model."""
        return self._model.info

    @property
    def tokenizer(self) -> Tokenizer:
        """The served model's tokenizer."""
        return self._model.tokenizer

    @property
    def saes(self) -> Mapping[str, LoadedSae]:
        """The served SAEs by name, without their weights."""
        return self._saes

    @property
    def capabilities(self) -> Capabilities:
        """What this engine can do."""
        return self._capabilities

    def is_ready(self) -> bool:
        """True while vLLM runs, and has done what it only does the first time."""
        return self._is_started and self._is_warm and self._client is not None and not self._client.is_dead

    def queued(self) -> int:
        """Requests that wait for a slot or for KV memory, those that vLLM has not yet seen included."""
        if self._client is None:
            return 0
        return max(self._running - self._slots, self._client.waiting)

    def start(self) -> None:
        """Takes requests from now on; call it on the event loop that will submit."""
        self._is_started = True
        self._warming = asyncio.get_running_loop().create_task(self._warm_up())

    def stop(self) -> None:
        """Ends vLLM; whatever still runs fails with Unavailable. Idempotent."""
        self._is_started = False
        for task in (self._warming, self._revival):
            if task is not None:
                task.cancel()
        for limit in self._limits:
            limit.reschedule(0)
        client, self._client = self._client, None
        if client is not None:
            client.shut_down()
            asyncio.get_running_loop().call_soon(client.close)

    async def generate(self, task: GenerateTask) -> AsyncGenerator[Chunk]:
        """Chunks as they are made; closing the iterator cancels the task.

        Raises:
            InvalidRequest: a sampling option that vLLM does not have.
        """
        uid = next(self._uids)
        order = orders.order(uid, task, self._names)
        sampling = asking.sampling(task, order, self._model.eos_ids)
        answer = Answer(task, Assembler(self.tokenizer.stream(), task.sampling.stop), self._model, self._metrics)
        async with aclosing(self._outputs(task, uid, sampling)) as outputs:
            async for output in outputs:
                chunk = answer.chunk(output)
                if answer.finish_reason is not None:
                    break
                yield chunk
        report = await self._report(task, uid, answer.tokens_read) if order is not None else None
        yield answer.last(chunk, report, self._saes)

    async def inspect(self, task: InspectTask) -> AsyncGenerator[ActivationPart]:
        """Activations once the input is read; closing the iterator cancels the task."""
        uid = next(self._uids)
        order = orders.order(uid, task, self._names)
        async with aclosing(self._outputs(task, uid, asking.reading(task, order))) as outputs:
            async for _ in outputs:
                pass
        report = await self._report(task, uid, len(task.tokens))
        special, info = self.tokenizer.special_ids, self.model
        receipt(
            task.steering, counts_of(report), read=task.tokens, forward_passes=report.forward_passes,
            saes=self._saes, special_ids=special, model_digest=info.digest,
        )  # fmt: skip
        for part in activations(task, report, self._names, self._model):
            yield part

    async def _warm_up(self) -> None:
        """vLLM compiles some of its sampling when it is first used: what steered requests need of it."""
        sampling = {"max_tokens": 1, "logprobs": 0, "detokenize": False}
        try:
            async with aclosing(self._up().generate({"prompt_token_ids": [0]}, sampling, "warm-up")) as outputs:
                async for _ in outputs:
                    pass
        except Died:
            self._lost()
        self._is_warm = True

    async def _outputs(
        self, task: GenerateTask | InspectTask, uid: int, sampling: Mapping[str, Any]
    ) -> AsyncGenerator[Any]:
        client = self._up()
        self._count(1)
        try:
            async with aclosing(client.generate(asking.prompt(task), sampling, str(uid))) as outputs:
                while True:
                    yield await self._in_time(task, anext(outputs))
        except StopAsyncIteration:
            return
        finally:
            self._count(-1)

    async def _report(self, task: GenerateTask | InspectTask, uid: int, tokens: int) -> orders.Report:
        report: orders.Report = await self._in_time(task, self._up().report(uid, tokens))
        return report

    async def _in_time(self, task: GenerateTask | InspectTask, work: Any) -> Any:
        """What ``work`` gives, before the deadline and while vLLM lives."""
        limit = asyncio.timeout(task.call.deadline - time.monotonic())
        self._limits.add(limit)
        try:
            async with limit:
                return await work
        except TimeoutError as err:
            if not self._is_started:
                raise Unavailable("the server stopped") from err
            raise DeadlineExceeded("the deadline passed before the answer was complete") from err
        except Died as err:
            raise self._lost() from err
        finally:
            self._limits.discard(limit)

    def _up(self) -> Client:
        if not self._is_started:
            raise Unavailable("the engine is not running", _RETRY_S)
        if self._client is None or self._client.is_dead:
            raise self._lost()
        return self._client

    def _lost(self) -> Unavailable:
        """vLLM died: it is started again, once; who asks meanwhile may come back."""
        if self._is_started and self._revival is None:
            _log.error("vLLM died; it starts again")
            self._metrics.engine_restarts.inc()
            self._revival = asyncio.get_running_loop().create_task(self._revive())
        return Unavailable("the engine failed and starts again", _RETRY_S)

    async def _revive(self) -> None:
        dead, self._client = self._client, None
        if dead is not None:
            await asyncio.to_thread(dead.shut_down)
            dead.close()
        while self._client is None:
            await asyncio.sleep(self._backoff.failed())
            try:
                self._client = await asyncio.to_thread(self._launch)
                self._backoff.started()
            except Exception:
                _log.exception("vLLM could not start again")
        self._revival = None

    def _count(self, change: int) -> None:
        self._running += change
        in_slots = min(self._running, self._slots)
        self._metrics.queue_length.set(self.queued())
        self._metrics.running_requests.set(in_slots)
        self._metrics.slots_in_use.set(in_slots)
