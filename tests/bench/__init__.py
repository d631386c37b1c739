"""What the engines do in a second, beside others on the same machine; ``python -m bench`` runs it."""
