"""HTML report from results of `bench` and `evaluate`."""

from .page import page

__all__ = ["page"]
