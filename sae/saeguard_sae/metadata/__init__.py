"""Labels, statistics and examples that others published, brought into the catalogue's units and files."""

from saeguard_sae.metadata.collecting import Dropped, Units
from saeguard_sae.metadata.importing import Imported, import_features
from saeguard_sae.metadata.merging import merge, write

__all__ = ["Dropped", "Imported", "Units", "import_features", "merge", "write"]
