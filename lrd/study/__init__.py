"""Studies: arms of a recipe, each run with several seeds, and what can be said about them.

| file | what it contains |
| --- | --- |
| `schema` | the study file: its keys, and how it is read |
| `grid` | the runs of a study, and what has been done of each |
| `runner` | runs them as child processes, some at a time |
| `progress` | what is shown meanwhile |
| `cost` | what the runs that are left will take |
| `results` | what a run recorded |
| `published` | results of somebody else, shown beside |
| `statistics` | means, intervals and paired differences |
| `report` | the results of a study as a table, Markdown and JSON |
| `pictures` | the curves of a study |
"""
