"""Who did what, when, under which policies: append-only records that nobody can change unseen."""
