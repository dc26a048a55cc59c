"""Cases with faults in all files and arguments that commands read: `make faults`.

Each case comes from (seed, group, number), so that a failed case can be run again:
`PYTHONPATH=tests python -m faults --seed 0 --only pictures 17`.
"""
