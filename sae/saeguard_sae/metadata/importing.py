"""From published files to features of the catalogue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from saeguard_sae.catalogue import Feature
from saeguard_sae.metadata import neuronpedia, table_csv
from saeguard_sae.metadata.collecting import Collector, Dropped, Scale, Units


@dataclass(frozen=True, slots=True)
class Imported:
    """What files say about an SAE's features."""

    features: dict[int, Feature]
    """By index, in raw units; a feature that no record mentions is not there."""
    read: int
    """Records."""
    dropped: Dropped


def import_features(
    files: Sequence[Path],
    d_sae: int,
    *,
    decoder_norms: Tensor | None = None,
    units: Units,
    source: str | None = None,
) -> Imported:
    """Reads files of one SAE; they may divide its features, or tell different things of the same ones.

    A file whose name ends in ``.csv`` or ``.csv.gz`` is a table, everything else a Neuronpedia export.

    Args:
        d_sae: features of the SAE.
        decoder_norms: [d_sae] lengths of the decoder's rows, in the SAE as it is served; needed for ``unit_decoder``.
        units: what the files count activations in.
        source: the SAE to take, as Neuronpedia calls it ("20-gemmascope-res-16k", or with the model before it and a
            slash); needed where the files hold several.

    Raises:
        BadCatalogue: a file that cannot be read or means another SAE; names file, line and field.
        ValueError: the norms are missing, or not one per feature.
    """
    collector = Collector(d_sae, Scale(units, decoder_norms, d_sae), source)
    for file in files:
        is_table = file.name.lower().removesuffix(".gz").endswith(".csv")
        for entry in table_csv.entries(file) if is_table else neuronpedia.entries(file):
            collector.add(entry)
    return Imported(collector.features(), collector.read, collector.dropped)
