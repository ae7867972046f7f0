"""Evaluators over a `View`."""
