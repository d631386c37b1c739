"""vLLM's engine against plain transformers: mixed batches, scopes, preemption, receipts, readings, text, ends."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from saeguard_sae.edits import Add, Clamp, Scale
from saeguard_server.engine.protocol import InspectTask, Pick
from saeguard_server.errors import DeadlineExceeded, InvalidRequest, NonFiniteOutput
from saeguard_server.interventions import FeatureRef, Scope
from saeguard_server.reply import Receipt
from saeguard_server.request import Call, GenerationRequest, Sampling, TextInput, TokenInput
from support import engines, reference, vllm
from support.engines import Answer, Running, World, edit, greedy, prompt
from support.models import BOS, EOS, PAD, SITES

SPECIAL = {BOS, EOS, PAD}
pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.filterwarnings("default")]


def plain(world: World, sae: str, feature: int, change: Any, applies: Any = lambda position, token: True) -> Any:
    module, side = SITES[world.model_type][sae]
    return reference.PlainEdit(world.saes[sae], module, side, feature, change, applies)


def receipt(answer: Answer) -> Receipt:
    assert answer.completion is not None
    assert answer.completion.receipt is not None
    return answer.completion.receipt


async def test_steered_and_unsteered_requests_share_a_batch_and_keep_to_themselves(llama: World, one: Running) -> None:
    lengths = [3, 40, 5, 61, 17, 29, 4, 90, 11, 50]
    edits = (edit("resid_post", 4, Clamp(4.0)), edit("mlp_out", 9, Scale(-2.0)))

    async def ask(index: int) -> Answer:
        await asyncio.sleep(0.01 * index)
        return await one.ask(greedy(prompt(index, lengths[index]), 10, interventions=edits if index % 2 else ()))

    got = await asyncio.gather(*(ask(index) for index in range(len(lengths))))
    both = [
        plain(llama, "resid_post", 4, lambda f: torch.full_like(f, 4.0)),
        plain(llama, "mlp_out", 9, lambda f: -2 * f),
    ]
    for index, (length, answer) in enumerate(zip(lengths, got, strict=True)):
        wanted = reference.generate(llama.model, prompt(index, length), 10, both if index % 2 else [], SPECIAL)
        assert answer.ids == wanted.tokens
        for at, token in enumerate(answer.tokens):
            assert token.logprob == pytest.approx(wanted.logprobs[at, token.id].item(), abs=1e-4)


@pytest.mark.parametrize(
    ("scope", "applies"),
    [
        (Scope("prompt"), lambda position, token: position < 20),
        (Scope("generated"), lambda position, token: position >= 20),
        (Scope(start=5, end=24), lambda position, token: 5 <= position < 24),
    ],
)
async def test_scopes_select_the_tokens_they_say(llama: World, one: Running, scope: Scope, applies: Any) -> None:
    got = await one.ask(greedy(prompt(3, 20), 12, interventions=(edit("resid_post", 4, Clamp(6.0), scope),)))
    steered = plain(llama, "resid_post", 4, lambda f: torch.full_like(f, 6.0), applies)
    assert got.ids == reference.generate(llama.model, prompt(3, 20), 12, [steered], SPECIAL).tokens
    read = [*prompt(3, 20), *got.ids][:-1]
    in_scope = sum(applies(at, token) and token not in SPECIAL for at, token in enumerate(read))
    assert receipt(got).interventions[0].tokens_eligible == in_scope


async def test_special_tokens_are_edited_only_when_asked(llama: World, one: Running) -> None:
    everywhere = edit("resid_post", 4, Clamp(9.0), Scope(include_special_tokens=True))
    got = await one.ask(greedy(prompt(1, 9), 6, interventions=(everywhere,)))
    steered = plain(llama, "resid_post", 4, lambda f: torch.full_like(f, 9.0))
    assert got.ids == reference.generate(llama.model, prompt(1, 9), 6, [steered], set()).tokens
    assert receipt(got).interventions[0].tokens_eligible == 9 + 5


async def test_preempted_requests_are_read_again_and_counted_once(llama: World, one: Running) -> None:
    """Eight requests that need more KV memory than there is: 1,008 tokens of 682."""
    before = one.engine._metrics.preemptions._value.get()
    steer = (edit("resid_post", 4, Clamp(4.0)),)
    got = await asyncio.gather(
        *(one.ask(greedy(prompt(index, 30), 96, interventions=steer, watch=(FeatureRef("resid_post", 7),)))
          for index in range(8))
    )  # fmt: skip
    assert one.engine._metrics.preemptions._value.get() > before
    steered = [plain(llama, "resid_post", 4, lambda f: torch.full_like(f, 4.0))]
    for index, answer in enumerate(got):
        if index in (0, 7):  # the oldest, and the first to be thrown out
            assert answer.ids == reference.generate(llama.model, prompt(index, 30), 96, steered, SPECIAL).tokens
        in_scope = sum(token not in SPECIAL for token in [*prompt(index, 30), *answer.ids][:-1])
        assert receipt(answer).interventions[0].tokens_eligible == in_scope
        assert [reading.position for reading in answer.readings] == list(range(30 + 95))


async def test_kv_of_one_steering_is_not_read_under_another(llama: World, one: Running) -> None:
    text = prompt(5, 80)
    steer = (edit("resid_pre", 4, Clamp(8.0)),)
    # Steered first: what it wrote is what an unsteered request would find.
    steered = await one.ask(greedy(text, 5, interventions=steer))
    before = await one.ask(greedy(text, 5))
    again = await one.ask(greedy(text, 5, interventions=steer))
    after = await one.ask(greedy(text, 5))
    assert before.ids == after.ids == reference.generate(llama.model, text, 5, [], SPECIAL).tokens
    change = [plain(llama, "resid_pre", 4, lambda f: torch.full_like(f, 8.0))]
    assert steered.ids == again.ids == reference.generate(llama.model, text, 5, change, SPECIAL).tokens
    assert steered.ids != before.ids
    assert receipt(again).interventions[0].tokens_eligible == 79 + 4


async def test_receipts_and_readings_are_the_embedded_engines(llama: World, one: Running) -> None:
    steer = (
        edit("resid_post", 4, Clamp(4.0), Scope("generated")),
        edit("mlp_in", 9, Scale(-2.0)),
        edit("attn_z", 3, Add(50.0)),
    )
    request = greedy(
        prompt(2, 25), 12, interventions=steer, max_relative_edit=0.5,
        watch=(FeatureRef("mlp_act", 5), FeatureRef("resid_post", 4), FeatureRef("mlp_in", 1)),
    )  # fmt: skip
    with engines.running(vllm.served(llama)) as embedded:
        wanted = await embedded.ask(request)
    got = await one.ask(request)
    assert got.ids == wanted.ids
    assert receipt(got).steering_digest == receipt(wanted).steering_digest
    for ours, theirs in zip(receipt(got).interventions, receipt(wanted).interventions, strict=True):
        for name in (
            "sae",
            "feature",
            "kind",
            "sae_digest",
            "site",
            "tokens_eligible",
            "tokens_edited",
            "tokens_capped",
        ):
            assert getattr(ours, name) == getattr(theirs, name)
        for name in ("mean_activation", "max_activation", "mean_relative_edit"):
            assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=1e-3, abs=1e-4)
    assert [one.position for one in got.readings] == [one.position for one in wanted.readings]
    for ours, theirs in zip(got.readings, wanted.readings, strict=True):
        assert ours.values == pytest.approx(theirs.values, rel=1e-3, abs=1e-4)


async def test_inspections_see_what_the_embedded_engine_sees(llama: World, one: Running) -> None:
    tokens = tuple(prompt(4, 33))
    picks = (
        Pick(sae="resid_post", top_k=5),
        Pick(sae="mlp_act", threshold=0.5),
        Pick(sae="attn_z", features=(7, 0, 90)),
    )
    steering = one.flow._prepare(
        greedy(list(tokens), 1, interventions=(edit("resid_pre", 4, Clamp(6.0)),)), Call("", 0)
    ).steering

    async def parts(engine: Any) -> dict[str, list[list[tuple[int, float]]]]:
        call = Call("inspect", time.monotonic() + 60)
        task = InspectTask(
            call=call, index=2, tokens=tokens, offsets=(None,) * len(tokens), picks=picks, steering=steering
        )
        rows: dict[str, list[list[tuple[int, float]]]] = {pick.sae: [] for pick in picks}
        async with aclosing(engine.inspect(task)) as found:
            async for part in found:
                assert (part.input, part.start) == (2, len(rows[part.sae]))
                assert [token.id for token in part.tokens] == list(tokens[part.start : part.start + len(part.tokens)])
                for first, last in pairwise(part.indptr):
                    rows[part.sae].append(list(zip(part.indices[first:last], part.values[first:last], strict=True)))
                assert part.last == (len(rows[part.sae]) == len(tokens))
        return rows

    with engines.running(vllm.served(llama)) as embedded:
        wanted = await parts(embedded.engine)
    got = await parts(one.engine)
    for sae, rows in wanted.items():
        assert len(got[sae]) == len(rows) == len(tokens)
        for ours, theirs in zip(got[sae], rows, strict=True):
            assert [index for index, _ in ours] == [index for index, _ in theirs]
            assert [value for _, value in ours] == pytest.approx([value for _, value in theirs], abs=1e-4)


async def test_log_probabilities_of_the_prompt_and_of_other_tokens(llama: World, one: Running) -> None:
    ids = prompt(6, 21)
    sampling = Sampling(max_new_tokens=4, temperature=0.0, logprobs=3, prompt_logprobs=True, ignore_eos=True)
    steer = (edit("resid_post", 4, Clamp(4.0)),)
    got = await one.ask(GenerationRequest(prompt=TokenInput(tuple(ids)), sampling=sampling, interventions=steer))
    change = [plain(llama, "resid_post", 4, lambda f: torch.full_like(f, 4.0))]
    wanted = reference.generate(llama.model, ids, 4, change, SPECIAL)
    for at, token in enumerate(got.tokens):
        best = wanted.logprobs[at].topk(3)
        assert [other.id for other in token.top] == best.indices.tolist()
        assert [other.logprob for other in token.top] == pytest.approx(best.values.tolist(), abs=1e-4)
    for at in (1, 9, 20):
        before = reference.generate(llama.model, ids[:at], 1, change, SPECIAL).logprobs[0, ids[at]]
        assert got.prompt_logprobs[at - 1] == pytest.approx(before.item(), abs=1e-4)
    assert len(got.prompt_logprobs) == 20


async def test_stop_strings_end_the_text_and_the_counts_where_they_are(llama: World, one: Running) -> None:
    steer = (edit("resid_post", 4, Clamp(4.0)),)
    sampling = Sampling(max_new_tokens=60, temperature=0.0, ignore_eos=True)
    request = GenerationRequest(prompt=TextInput("Once upon a time"), sampling=sampling, interventions=steer)
    free = await one.ask(request)
    stop = free.text[7:9]
    cut = free.text.index(stop)
    got = await one.ask(stopping(request, stop))
    assert got.text == free.text[:cut]
    assert got.completion is not None
    assert (got.completion.finish_reason, got.completion.stop_string) == ("stop", stop)
    assert got.ids == free.ids[: len(got.ids)]
    in_scope = got.completion.prompt_tokens - 1 + sum(token not in SPECIAL for token in got.ids[:-1])
    assert receipt(got).interventions[0].tokens_eligible == in_scope


def stopping(request: GenerationRequest, stop: str) -> GenerationRequest:
    return replace(request, sampling=replace(request.sampling, stop=(stop,)))


async def test_the_end_token_ends_and_is_no_text(llama: World, one: Running) -> None:
    # The reference goes on past it: where it would come is found by asking for log-probabilities.
    request = GenerationRequest(
        prompt=TokenInput((BOS, 5, 6)),
        sampling=Sampling(max_new_tokens=120, temperature=1.5, seed=3),
    )
    got = await one.ask(request)
    again = await one.ask(request)
    assert got.ids == again.ids
    assert got.completion is not None
    if EOS in got.ids:
        assert got.ids.index(EOS) == len(got.ids) - 1
        assert got.completion.finish_reason == "stop"
    else:
        assert got.completion.finish_reason == "length"


async def test_a_seed_gives_the_same_tokens_in_any_company(llama: World, one: Running) -> None:
    def sampled(seed: int, **more: Any) -> GenerationRequest:
        sampling = Sampling(
            max_new_tokens=16, temperature=1.1, top_p=0.9, top_k=40, min_p=0.01, repetition_penalty=1.2, seed=seed,
            ignore_eos=True,
        )  # fmt: skip
        return GenerationRequest(prompt=TokenInput(tuple(prompt(seed, 9))), sampling=sampling, **more)

    alone = (await one.ask(sampled(7))).ids
    steer = (edit("resid_pre", 1, Clamp(5.0)),)
    crowd = await asyncio.gather(
        *(one.ask(sampled(40 + index, interventions=steer if index % 2 else ())) for index in range(6)),
        one.ask(sampled(7)),
    )
    assert crowd[-1].ids == alone
    assert (await one.ask(sampled(8))).ids != alone


async def test_what_vllm_does_not_sample_is_refused_by_name(one: Running) -> None:
    for temperature in (2.5, 0.005):
        sampling = Sampling(max_new_tokens=2, temperature=temperature)
        with pytest.raises(InvalidRequest, match=r"sampling\.temperature: must be 0 .* 0\.01 to 2 with the vllm"):
            await one.ask(GenerationRequest(prompt=TokenInput((BOS, 5)), sampling=sampling))


async def test_closing_the_stream_frees_the_slots(llama: World, one: Running) -> None:
    steer = (edit("resid_post", 4, Clamp(4.0)),)
    await asyncio.gather(*(one.ask(greedy(prompt(i, 20), 100, interventions=steer), stop_after=3) for i in range(12)))
    got = await asyncio.gather(*(one.ask(greedy(prompt(i, 20), 4)) for i in range(8)))
    assert got[0].ids == reference.generate(llama.model, prompt(0, 20), 4, [], SPECIAL).tokens
    assert one.engine.queued() == 0


async def test_a_deadline_ends_its_request_alone(llama: World, one: Running) -> None:
    late = asyncio.create_task(one.ask(greedy(prompt(1, 20), 100), deadline_s=0.02))
    other = await one.ask(greedy(prompt(2, 20), 20))
    with pytest.raises(DeadlineExceeded):
        await late
    assert other.ids == reference.generate(llama.model, prompt(2, 20), 20, [], SPECIAL).tokens


async def test_a_request_whose_values_blow_up_fails_alone(llama: World, one: Running) -> None:
    wild = (edit("resid_post", 4, Clamp(3e38)), edit("resid_pre", 3, Scale(-3e38)))
    good = [one.ask(greedy(prompt(index, 12), 20)) for index in range(3)]
    bad = [one.ask(greedy(prompt(9, 60), 20, interventions=wild)) for _ in range(5)]
    results = await asyncio.gather(*good, *bad, return_exceptions=True)
    # The memory that the poisoned requests had is used again.
    again = await asyncio.gather(*(one.ask(greedy(prompt(index, 12), 20)) for index in range(8)))
    assert all(isinstance(result, NonFiniteOutput) for result in results[3:])
    for index, answer in (*enumerate(results[:3]), *enumerate(again)):
        assert isinstance(answer, Answer)
        assert answer.ids == reference.generate(llama.model, prompt(index, 12), 20, [], SPECIAL).tokens


async def test_timings_and_metrics_are_kept(one: Running) -> None:
    before = one.engine._metrics.generated_tokens._value.get()
    got = await one.ask(greedy(prompt(1, 20), 7))
    assert one.engine._metrics.generated_tokens._value.get() == before + 7
    assert got.completion is not None
    timings = got.completion.timings
    assert 0 <= timings.queue_s <= timings.time_to_first_token_s <= timings.total_s
