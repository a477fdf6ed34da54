"""Computes steps of a run again, in processes of their own.

- `plan`: what is to be computed, in legs; `launching` starts the ranks for it
- `ranks`: what each of them runs: the functions of the training loop
- `observers`: what looks at the steps; `samples`: which images each rank saw
- `state`: all that a step changes, as named values and digests
"""
