"""Turns requests into tokens. One package or file per engine, behind the protocol in ``protocol``."""
