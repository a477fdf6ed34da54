"""The `lrd` command.

| module | what it holds |
| --- | --- |
| `app` | the command line: subcommands, options, exit status |
| `tables` | tables of runs and checkpoints |
| `plots` | pictures of learning rates |
"""
