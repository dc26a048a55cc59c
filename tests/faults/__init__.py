"""Faults put into everything the commands read and write: `make faults`.

Every case comes from (seed, group, number), so that one that fails can be run again:
`PYTHONPATH=tests python -m faults --seed 0 --only pictures 17`.
"""
