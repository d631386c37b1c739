"""Makes the bundled demonstration again from nothing; ``python -m demo.build`` runs it."""
