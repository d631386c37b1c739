"""Where policies live: revisions and activations, append-only, in SQLite, Postgres or a read-only directory of YAML."""
