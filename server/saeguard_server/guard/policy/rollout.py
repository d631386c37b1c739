"""Which requests a share holds: by a stable hash, so that replicas agree and a share that grows keeps everyone."""

from __future__ import annotations

from hashlib import blake2b

from saeguard_server.guard.policy.model import Policy

_BYTES = 8


def position(policy: str, by: str, key: str) -> float:
    """Where a caller or conversation stands in a policy's rollout, in [0, 1): in the share exactly if below it."""
    digest = blake2b(f"{policy}\0{by}\0{key}".encode(errors="surrogatepass"), digest_size=_BYTES).digest()
    # The 53 bits that a float holds: rounding all 64 could give 1.
    return (int.from_bytes(digest, "big") >> 11) / 2.0**53


def is_chosen(policy: Policy, caller: str, conversation: str) -> bool:
    """Whether the policy's rollout holds a request."""
    share = policy.rollout.share
    if share in (0.0, 1.0):
        return share == 1.0
    if policy.rollout.by == "conversation" and conversation:
        return position(policy.name, "conversation", conversation) < share
    return position(policy.name, "caller", caller) < share
