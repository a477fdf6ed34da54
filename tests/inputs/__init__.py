"""Bad inputs: python -m tests.inputs gives lrd each of them and looks at what it says.

| module | what it holds |
| --- | --- |
| `cases` | an input, and what is expected of it |
| `lab` | runs inputs, and judges what came of each |
| `recipe_values`, `recipe_files` | values of a recipe's keys; YAML and overrides |
| `training_parts` | optimizers and schedules |
| `image_folders`, `saved_runs` | folders of images; checkpoints, event files and run directories |
| `environments`, `commands` | variables, launchers and streams; the commands of `lrd` |
"""
