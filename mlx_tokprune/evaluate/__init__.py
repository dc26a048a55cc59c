"""Evaluation of pruned answers against the unpruned and the right answers."""

from ..measure.accuracy import SCHEMA, read_result

__all__ = ["SCHEMA", "read_result"]
