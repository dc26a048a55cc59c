"""What is measured, and how: below `bench` and `evaluate`."""
