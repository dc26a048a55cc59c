"""Commands, and the flags that all share; only commands import from here.

Others are `__main__.py` of the room that they are about.
"""
