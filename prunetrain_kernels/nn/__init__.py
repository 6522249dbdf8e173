"""Modules over `ops/` (not there yet)."""
