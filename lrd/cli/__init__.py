"""The `lrd` command.

| module | what it holds |
| --- | --- |
| `app` | the command line: subcommands, options, exit status |
| `launch` | several ranks: Accelerate's launcher without its trace-backs |
| `rank` | what `launch` starts on each rank |
| `check` | a recipe tried out without training |
| `study` | arms of a recipe over several seeds |
| `tables` | tables of runs and checkpoints |
| `plots` | pictures of learning rates |
| `compare` | runs side by side: a table, curves, an HTML page |
"""
