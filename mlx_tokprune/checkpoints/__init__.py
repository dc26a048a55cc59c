"""Checkpoint folders: find, open, check and load them."""
