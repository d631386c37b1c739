"""What a generation gives back. Names and fields are the wire's, so that one function reads them all."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token the model could have taken, and its log-probability in nats."""

    id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class Token:
    """A generated token; ``logprob`` (nats) and ``top_logprobs`` where ``logprobs`` was asked for."""

    id: int
    logprob: float | None = None
    top_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class FeatureReading:
    """Values of the watched features on one token the model has read, before any edit, in the order of ``watch``.

    ``position`` counts prompt and generated tokens together.
    """

    position: int
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens read and made."""

    prompt_tokens: int
    generated_tokens: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the server's time went, in seconds."""

    queue_s: float
    time_to_first_token_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class InterventionReceipt:
    """What one edit did.

    Attributes:
        sae_digest: the SAE's digest, as in the catalogue.
        site: where it was applied, such as "resid_post.12".
        tokens_eligible: tokens inside the scope that the model read.
        tokens_edited: eligible tokens whose feature value changed.
        mean_activation: feature value before the edit, over eligible tokens; ``max_activation`` likewise.
        mean_relative_edit: size of the edit as a share of the activation's, mean over eligible tokens.
        tokens_capped: tokens where ``max_relative_edit`` made the site's edit smaller.
        policy: whose ``rule`` made it; "" is the request's own edit.
        is_shadow: counted as if it were made, and not made.
    """

    sae: str
    feature: int
    kind: str
    sae_digest: str
    site: str
    tokens_eligible: int
    tokens_edited: int
    mean_activation: float
    max_activation: float
    mean_relative_edit: float
    tokens_capped: int
    policy: str
    rule: str
    is_shadow: bool


@dataclass(frozen=True, slots=True)
class TriggerReceipt:
    """What one trigger saw.

    Attributes:
        policy: whose trigger it is; "" is the request's own.
        is_shadow: evaluated, and not acted on.
        tokens_evaluated: tokens inside the condition's scope that the model read.
        tokens_on: evaluated tokens on which it held.
        first_position: of the token on which it first held; None if it never did.
    """

    policy: str
    name: str
    is_shadow: bool
    tokens_evaluated: int
    tokens_on: int
    first_position: int | None = None


@dataclass(frozen=True, slots=True)
class Receipt:
    """What was applied, measured while the model ran; digests are SHA-256 in hex."""

    model_digest: str
    steering_digest: str
    interventions: tuple[InterventionReceipt, ...]
    forward_passes: int
    triggers: tuple[TriggerReceipt, ...]


@dataclass(frozen=True, slots=True)
class StoppedBy:
    """The trigger that ended a generation; ``policy`` is "" for the request's own."""

    policy: str
    name: str


@dataclass(frozen=True, slots=True)
class PolicyFacts:
    """Which policies decided about a request: what was in force when it was admitted, however long it ran.

    Attributes:
        activation: number of the act that put ``revision`` in force; later acts have larger ones.
        enforced: names of the policies that were applied.
        shadowed: names of those that were evaluated and not applied.
    """

    activation: int
    revision: int
    enforced: tuple[str, ...]
    shadowed: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished generation.

    Attributes:
        readings: one per token read, where features were watched.
        prompt_logprobs: nats, one per prompt token after the first, where asked for.
        finish_reason: "stop" (end of sequence or stop string), "length" or "feature" (a trigger); a newer server may
            know more.
        stop_string: the stop string that ended it, or "".
        receipt: present exactly when edits or triggers, the request's or a policy's, had to do with it.
        stopped_by: present exactly when the finish reason is "feature".
        policy: present exactly when the server has policies.
        seed: the seed that was used; the same request with it gives the same tokens.
    """

    text: str
    tokens: tuple[Token, ...]
    readings: tuple[FeatureReading, ...]
    prompt_logprobs: tuple[float, ...]
    finish_reason: str
    stop_string: str
    usage: Usage
    timings: Timings
    seed: int
    request_id: str
    receipt: Receipt | None = None
    stopped_by: StoppedBy | None = None
    policy: PolicyFacts | None = None


@dataclass(frozen=True, slots=True)
class StreamChunk:
    """What became certain with one message; ``text`` may be empty.

    The last chunk, and no other, has ``completion``: the whole generation, as ``generate`` would have given it.
    """

    text: str
    tokens: tuple[Token, ...]
    readings: tuple[FeatureReading, ...]
    completion: Completion | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """A generation with all that policies and the request do to it, and without any of that.

    Attributes:
        first_divergence: index of the first generated token that differs, where one ends that of its end; None if they
            are the same.
        kl_nats: for each token of ``steered``: KL(steered || unsteered) of the distributions it was drawn from, both
            after the same tokens.
    """

    steered: Completion
    unsteered: Completion
    first_divergence: int | None
    kl_nats: tuple[float, ...]
