"""The bundled demonstration: a small model of a synthetic language, its SAEs, and what steering them does."""
