"""The fault campaign: `python -m tests.faults`, from the root of the repository."""
