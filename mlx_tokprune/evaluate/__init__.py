"""Answers under pruning, beside the unpruned model's and the right ones."""

from ..measure.accuracy import SCHEMA, read_result

__all__ = ["SCHEMA", "read_result"]
