"""Conditions on features, decided token by token while the model reads: state per request, arithmetic for all at once.

``rule``: what a guard is; ``probes``: the sums they look at; ``state``: what they remember; ``deciding``: from sums to
on or off; ``table``: all of it for the requests of an engine.
"""

from saeguard_sae.guards.rule import NEVER, Guard, Seen, Summand
from saeguard_sae.guards.table import Guards, Memory

__all__ = ["NEVER", "Guard", "Guards", "Memory", "Seen", "Summand"]
