"""A reply that does not prove that its text was steered as asked is not taken for one that was."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from saeguard.requests import GenerateRequest
from saeguard.v1 import generation_service_pb2 as gen
from saeguard_client import (
    Apply,
    Clamp,
    Completion,
    Condition,
    InterventionReceipt,
    PolicyFacts,
    Receipt,
    ReceiptMismatch,
    Stop,
    StoppedBy,
    Timings,
    Trigger,
    TriggerReceipt,
    Usage,
    Zero,
    errors,
)

EDIT = InterventionReceipt(
    sae="a", feature=3, kind="clamp", sae_digest="c", site="resid_post.4", tokens_eligible=5, tokens_edited=4,
    mean_activation=0.5, max_activation=2.0, mean_relative_edit=0.2, tokens_capped=0,
    policy="", rule="", is_shadow=False,
)  # fmt: skip
FIRED = TriggerReceipt("", "secret", False, 5, 1, 4)
RECEIPT = Receipt("m", "s", (EDIT,), 3, (FIRED,))
FACTS = PolicyFacts(activation=7, revision=3, applied=("calm",), shadowed=("quiet",))
DONE = Completion(
    text="", tokens=(), readings=(), prompt_logprobs=(), finish_reason="feature", stop_string="", usage=Usage(1, 0),
    timings=Timings(0, 0, 0), seed=1, request_id="r", receipt=RECEIPT, stopped_by=StoppedBy("", "secret"), policy=FACTS,
)  # fmt: skip
WHEN = Condition.on("a", 9, 1.0)
REQUEST = GenerateRequest(
    input="x", interventions=[Clamp("a", 3, 1.0)], triggers=[Trigger("secret", WHEN, Stop())], policies=["calm"]
)


def test_a_reply_that_tells_of_everything_passes() -> None:
    errors.check_receipt(DONE, REQUEST)


def test_an_edit_that_a_policy_makes_too_is_told_of_by_its_rule() -> None:
    by_policy = replace(EDIT, kind="zero", policy="calm", rule="r")
    errors.check_receipt(replace(DONE, receipt=replace(RECEIPT, interventions=(by_policy,))), REQUEST)


@pytest.mark.parametrize(
    ("reply", "missing"),
    [
        (replace(DONE, receipt=None), "it has no receipt"),
        (replace(DONE, receipt=replace(RECEIPT, interventions=())), "clamp of a:3"),
        (replace(DONE, receipt=replace(RECEIPT, interventions=(replace(EDIT, is_shadow=True),))), "clamp of a:3"),
        (replace(DONE, receipt=replace(RECEIPT, interventions=(replace(EDIT, kind="zero"),))), "clamp of a:3"),
        (replace(DONE, receipt=replace(RECEIPT, triggers=())), "the trigger 'secret'"),
        (replace(DONE, receipt=replace(RECEIPT, triggers=(replace(FIRED, first_position=None),))), "'secret' fired"),
        (replace(DONE, stopped_by=None), "finish reason is 'feature'"),
        (replace(DONE, policy=None), "the policy 'calm'"),
        (replace(DONE, policy=replace(FACTS, applied=())), "the policy 'calm'"),
        (replace(DONE, receipt=replace(RECEIPT, interventions=(EDIT, replace(EDIT, policy="x")))), "policy 'x'"),
    ],
)
def test_what_is_missing_is_named(reply: Completion, missing: str) -> None:
    with pytest.raises(ReceiptMismatch, match=missing) as caught:
        errors.check_receipt(reply, REQUEST)
    assert caught.value.reason == "RECEIPT_MISMATCH"


def test_a_triggers_edits_are_wanted_too() -> None:
    apply = Trigger("secret", WHEN, Apply([Zero("a", 8)]))
    with pytest.raises(ReceiptMismatch, match="zero of a:8"):
        errors.check_receipt(DONE, GenerateRequest(input="x", triggers=[apply]))


@pytest.mark.parametrize("method", ["generate", "generate_stream"])
def test_both_ways_to_generate_check_unless_told_otherwise(
    server: Any, shell: Any, whole_reply: gen.GenerateResponse, stream_replies: Any, method: str
) -> None:
    server.on("Generate", whole_reply)
    server.on("GenerateStream", stream_replies)

    def ask(**changes: Any) -> Any:
        arguments = {"steer": [Zero("resid4", 3)], **changes}
        if method == "generate":
            return shell.call(method, "Once", **arguments)
        return list(shell.stream(method, "Once", **arguments))[-1].completion

    with pytest.raises(ReceiptMismatch, match="zero of resid4:3"):
        ask()
    assert ask(check_receipt=False).text == "Once upon a"
    assert ask(steer=[Clamp("resid4", 17, 1.0)]).text == "Once upon a"
