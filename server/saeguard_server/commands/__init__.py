"""Commands of ``saeguard`` that need the server's packages."""
