"""One thing about an SAE done otherwise, with what to write into its settings for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeAlias

from saeguard_sae.check.tally import Reader
from saeguard_sae.check.variant import Variant
from saeguard_sae.dictionary import Dictionary
from saeguard_sae.site import Site
from saeguard_sae.temporal import Temporal

Kind: TypeAlias = Literal["site", "bias", "normalisation", "decoder norms", "scale", "processing"]


class Setup(NamedTuple):
    """Where an SAE reads, whose activations it must reproduce, and by which conventions."""

    reads: Site
    target: Site | None
    reader: Reader


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """One thing done otherwise. ``setting``: what to write into the settings for it, None where there is none."""

    kind: Kind
    what: str
    setting: str | None
    apply: Callable[[Setup], Setup]

    def then(self, other: Change) -> Change:
        """Both at once."""
        both = None if self.setting is None or other.setting is None else f"{self.setting}\n{other.setting}"
        return Change(self.kind, f"{self.what}, and {other.what}", both, lambda setup: other.apply(self.apply(setup)))


def of_coder(**fields: Any) -> Callable[[Setup], Setup]:
    """The change of these fields of what is served."""

    def apply(setup: Setup) -> Setup:
        reader = setup.reader
        assert not isinstance(reader, Temporal), "its conventions are never changed"
        if isinstance(reader, Variant):
            return setup._replace(reader=replace(reader, dictionary=replace(reader.dictionary, **fields)))
        return setup._replace(reader=replace(reader, **fields))

    return apply


def of_variant(**fields: Any) -> Callable[[Setup], Setup]:
    """The change of these factors, which leaves the weights alone."""

    def apply(setup: Setup) -> Setup:
        assert isinstance(setup.reader, Variant), "only a dictionary is read with factors"
        return setup._replace(reader=replace(setup.reader, **fields))

    return apply


def of_dictionary(change: Callable[[Dictionary], Dictionary]) -> Callable[[Setup], Setup]:
    """A change that depends on what the dictionary is by then."""

    def apply(setup: Setup) -> Setup:
        assert isinstance(setup.reader, Variant), "only a dictionary is changed so"
        return setup._replace(reader=replace(setup.reader, dictionary=change(setup.reader.dictionary)))

    return apply
