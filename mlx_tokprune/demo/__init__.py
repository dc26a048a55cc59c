"""Demo of conversion, pruning, answers and actions with the embedded models."""
