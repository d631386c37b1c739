"""What both clients can be asked, once: every function's parameters and docstring are those of two methods.

Each builds its call and raises ValueError, naming the argument, for what Python or the wire cannot hold. Every method
takes ``deadline_s`` (None: the client's) and ``request_id`` (sent as ``x-request-id``) and raises SaeguardError.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from saeguard_client._wire import activations as activations_wire
from saeguard_client._wire import catalog, generation
from saeguard_client._wire import policies as policies_wire
from saeguard_client.activations import ActivationPart, Activations
from saeguard_client.calls import EitherCall, GatheredCall, PagedCall, PerCall, UnaryCall
from saeguard_client.catalog import Feature, FeatureRef, Model, Sae, ServerInfo
from saeguard_client.inputs import Input
from saeguard_client.interventions import Intervention
from saeguard_client.policies import Activation, PolicyChange, PolicyHistory, PolicySet
from saeguard_client.results import Comparison, Completion, StreamChunk
from saeguard_client.sampling import Sampling
from saeguard_client.triggers import Trigger


def generate(
    input: Input,
    *,
    steer: Iterable[Intervention] = (),
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int | None = None,
    stop: str | Iterable[str] = (),
    logprobs: int | None = None,
    ignore_eos: bool = False,
    prompt_logprobs: bool = False,
    max_relative_edit: float | None = None,
    watch: Iterable[FeatureRef] = (),
    triggers: Iterable[Trigger] = (),
    policies: str | Iterable[str] = (),
    conversation: str | None = None,
    min_policy_activation: int | None = None,
    check_receipt: bool = True,
    deadline_s: float | None = None,
    request_id: str | None = None,
) -> EitherCall[Completion, StreamChunk]:
    """Continue the prompt, steered by this request's edits.

    ``generate`` gives a Completion. ``generate_stream`` gives an iterator of StreamChunk as they are made, whose last
    one holds the Completion; closing the iterator early cancels the generation.

    Args:
        input: text, chat messages (ChatMessage or dicts with role and content), or token ids.
        steer: edits, at most one per feature. With any, the completion has a receipt of what was applied.
        max_new_tokens: None is the server's default, as it is for everything below.
        temperature: 0 is greedy.
        top_p: smallest set of tokens with at least this probability.
        top_k: most likely tokens kept; 0 is off.
        min_p: share of the likeliest token's probability that a token must have.
        repetition_penalty: above 0; 1 is off.
        seed: the same request with the same seed gives the same tokens.
        stop: strings where the text ends; they are not part of it.
        logprobs: also give log-probabilities of this many likeliest tokens; 0 gives the chosen token's alone.
        ignore_eos: go on after the end-of-sequence token.
        prompt_logprobs: log-probability of every prompt token given those before it.
        max_relative_edit: limit on an edit's size as a share of the activation's.
        watch: features to read on every token without editing them.
        triggers: what to do when features fire. With any, the completion has a receipt.
        policies: names of policies that shall apply whether or not their target and rollout choose this request.
        conversation: what a policy's rollout by conversation hashes.
        min_policy_activation: the oldest activation of policies that may decide; waited for until the deadline.
        check_receipt: raise ReceiptMismatch where the receipt does not tell of all the edits, triggers and policies
            that were asked for.
    """
    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop,
        logprobs=logprobs,
        ignore_eos=ignore_eos,
        prompt_logprobs=prompt_logprobs,
    )
    asked = generation.Generation(
        input=input,
        sampling=sampling,
        steer=steer,
        max_relative_edit=max_relative_edit,
        watch=watch,
        triggers=triggers,
        # A lone string is one name: taken as a sequence it would be one per character.
        policies=(policies,) if isinstance(policies, str) else policies,
        conversation=conversation,
        min_policy_activation=min_policy_activation,
        check_receipt=check_receipt,
    )
    return generation.call(asked, PerCall(deadline_s=deadline_s, request_id=request_id))


def compare(
    input: Input,
    *,
    steer: Iterable[Intervention] = (),
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    seed: int | None = None,
    max_relative_edit: float | None = None,
    triggers: Iterable[Trigger] = (),
    policies: str | Iterable[str] = (),
    conversation: str | None = None,
    check_receipt: bool = True,
    deadline_s: float | None = None,
    request_id: str | None = None,
) -> UnaryCall[Comparison]:
    """What policies and this request's edits change: the same generation with and without all of that, in one batch.

    Needs the role policy-write: it shows what policies suppress. Arguments are as in ``generate``.
    """
    asked = generation.Generation(
        input=input,
        sampling=Sampling(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed),
        steer=steer,
        max_relative_edit=max_relative_edit,
        watch=(),
        triggers=triggers,
        policies=(policies,) if isinstance(policies, str) else policies,
        conversation=conversation,
        min_policy_activation=None,
        check_receipt=check_receipt,
    )
    return generation.compare(asked, PerCall(deadline_s=deadline_s, request_id=request_id))


def activations(
    inputs: str | Sequence[Input],
    saes: Iterable[str] = (),
    *,
    top_k: int | None = None,
    threshold: float | None = None,
    features: Iterable[FeatureRef] | None = None,
    steer: Iterable[Intervention] = (),
    deadline_s: float | None = None,
    request_id: str | None = None,
) -> GatheredCall[list[Activations], ActivationPart]:
    """Which features fire on which token of each input, under each SAE.

    ``activations`` gives a list of Activations, by input and then by SAE. ``activations_stream`` gives an iterator of
    ActivationPart as they arrive, each a run of whole tokens; closing it early cancels the reading.

    Args:
        inputs: a sequence of inputs as ``generate`` takes them; a lone string is one input.
        saes: names of SAEs; may be left out with ``features``.
        top_k: the largest activations of each token. Give exactly one of top_k, threshold and features.
        threshold: every activation above it.
        features: just these, zeros included.
        steer: read under these edits; a feature is read before the edits of its own site.
    """
    chosen = activations_wire.selection(top_k, threshold, features)
    return activations_wire.call(inputs, saes, chosen, steer, PerCall(deadline_s=deadline_s, request_id=request_id))


def model(*, deadline_s: float | None = None, request_id: str | None = None) -> UnaryCall[Model]:
    """The served Model."""
    return catalog.model(PerCall(deadline_s=deadline_s, request_id=request_id))


def saes(*, deadline_s: float | None = None, request_id: str | None = None) -> UnaryCall[tuple[Sae, ...]]:
    """Every served Sae."""
    return catalog.saes(PerCall(deadline_s=deadline_s, request_id=request_id))


def feature(
    sae: str, index: int, *, deadline_s: float | None = None, request_id: str | None = None
) -> UnaryCall[Feature]:
    """One Feature's catalogue entry; raises NotFound where there is no such SAE or index."""
    return catalog.feature(FeatureRef(sae, index), PerCall(deadline_s=deadline_s, request_id=request_id))


def features(
    sae: str | None = None,
    query: str = "",
    limit: int | None = None,
    *,
    deadline_s: float | None = None,
    request_id: str | None = None,
) -> PagedCall[Feature]:
    """An iterator of Feature, labelled ones first, which asks for pages as they are needed.

    Args:
        sae: None is every SAE.
        query: words that the label, promoted tokens or examples must contain, in any case.
        limit: None is all.
        deadline_s: for each page.
    """
    return catalog.features(sae, query, limit, PerCall(deadline_s=deadline_s, request_id=request_id))


def policies(
    revision: int | None = None, *, deadline_s: float | None = None, request_id: str | None = None
) -> UnaryCall[PolicySet]:
    """The PolicySet of a revision; of the latest where none is named. Needs the role policy-read."""
    return policies_wire.listed(revision, PerCall(deadline_s=deadline_s, request_id=request_id))


def apply_policies(
    documents: Mapping[str, str],
    *,
    etag: str = "",
    reason: str = "",
    prune: bool = False,
    dry_run: bool = False,
    deadline_s: float | None = None,
    request_id: str | None = None,
) -> UnaryCall[PolicyChange]:
    """Makes a revision of YAML documents, checked completely before it is stored. It is not in force until activated.

    Args:
        documents: content by file name; JSON files of probes that they name too.
        etag: as ``policies`` gave it; raises Conflict where there is a newer revision. "" is for the first.
        reason: why, for the history.
        prune: delete policies that the documents do not hold.
        dry_run: check and compare only.
    """
    options = PerCall(deadline_s=deadline_s, request_id=request_id)
    return policies_wire.applied(documents, etag, reason, prune, dry_run, options)


def delete_policy(
    name: str, *, etag: str, reason: str = "", deadline_s: float | None = None, request_id: str | None = None
) -> UnaryCall[PolicyChange]:
    """Makes a revision without this policy; as ``apply_policies``."""
    return policies_wire.deleted(name, etag, reason, PerCall(deadline_s=deadline_s, request_id=request_id))


def activate_revision(
    revision: int,
    *,
    expected_activation: int,
    reason: str = "",
    deadline_s: float | None = None,
    request_id: str | None = None,
) -> UnaryCall[Activation]:
    """Puts a revision in force, a newer or an older one.

    Args:
        expected_activation: number of what the caller believes to be in force, 0 for nothing; raises Conflict where it
            is not.
    """
    options = PerCall(deadline_s=deadline_s, request_id=request_id)
    return policies_wire.activated(revision, reason, expected_activation, options)


def rollback_policies(
    revision: int | None = None,
    *,
    expected_activation: int,
    reason: str = "",
    deadline_s: float | None = None,
    request_id: str | None = None,
) -> UnaryCall[Activation]:
    """Puts an older revision in force; called again, it goes further back. Raises NotFound where there is none.

    Args:
        revision: None is, of those older than the present one, the one that was in force last.
        expected_activation: as for ``activate_revision``: whoever rolls back at the same time does not go two steps.
    """
    options = PerCall(deadline_s=deadline_s, request_id=request_id)
    return policies_wire.rolled_back(revision, reason, expected_activation, options)


def policy_history(
    limit: int | None = None, *, deadline_s: float | None = None, request_id: str | None = None
) -> UnaryCall[PolicyHistory]:
    """Revisions and activations, at most ``limit`` of each (None is the server's default), the latest first."""
    return policies_wire.history(limit, PerCall(deadline_s=deadline_s, request_id=request_id))


def info(*, deadline_s: float | None = None, request_id: str | None = None) -> UnaryCall[ServerInfo]:
    """The server's ServerInfo: version, engine, limits, kinds of edit."""
    return catalog.info(PerCall(deadline_s=deadline_s, request_id=request_id))


def healthy(service: str = "", *, deadline_s: float | None = None, request_id: str | None = None) -> UnaryCall[bool]:
    """Whether the server, or one of its services by full name, is serving; False also where it cannot be reached."""
    return catalog.health(service, PerCall(deadline_s=deadline_s, request_id=request_id))
