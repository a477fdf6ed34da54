"""A time machine over runs: any step of a run can be computed again.

Masks, the order of samples and their augmentation are functions of a seed and a position, and a
resume is exact. So a run that starts at a checkpoint, with the recipe, the code, and as many ranks
and threads as then, takes the same steps, bit for bit.

Two ways to count are met here. `first` and `last` of legs, windows and segments are steps *done*:
a window from 5 to 10 has the steps number 6 to 10. Records, observers and the command line name
steps by their number, from 1. The state after step number 10 is that when 10 steps are done.

- `history`: what the files of a run say of its steps, and under which circumstances they were taken
- `computing`: computes steps again
- `records`: the scalars of a run, compared with those of a replay
- `rerun`, `verify`, `diff`, `fork`: the questions that are answered by it
- `probe`, `coverage`: the lr of any element at any step, for which nothing has to be computed again
"""
