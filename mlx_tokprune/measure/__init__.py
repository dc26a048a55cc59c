"""Measurements of `bench` and `evaluate`: subjects, costs, intervals, results."""
