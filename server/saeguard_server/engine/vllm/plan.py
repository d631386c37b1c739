"""What vLLM's workers serve; in its ``additional_config``, which is a part of its compiled graphs' key."""

from __future__ import annotations

import msgspec

from saeguard_server.settings import SaeSettings


class Plan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The SAEs in the order in which orders number them."""

    saes: tuple[SaeSettings, ...]
    digests: dict[str, str]
    """Of the SAEs by name, as the server has them; workers refuse others."""
    slots: int
    """Requests in one pass at most."""
    special_ids: tuple[int, ...]
    """Tokens that are edited only when asked."""
