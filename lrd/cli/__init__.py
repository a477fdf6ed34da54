"""The `lrd` command.

| module | what it holds |
| --- | --- |
| `app` | the command line: subcommands, options, exit status |
| `launch` | several ranks: Accelerate's launcher without its trace-backs |
| `rank` | what `launch` starts on each rank |
| `check` | a recipe tried out without training |
| `run_records` | what the files of a run directory say |
| `tables` | tables of runs and checkpoints |
| `plots` | pictures of learning rates |
| `compare` | runs side by side: a table, curves, an HTML page |
"""
