"""The training state on disk.

| file | what it contains |
| --- | --- |
| `store` | write, verify, find, keep and delete checkpoints |
| `manifest` | size and SHA-256 of each file of a checkpoint |
| `async_writer` | write checkpoints in the background while training goes on |
| `transfer` | copy the newest checkpoint from another host to rank 0's |
| `run_dir` | the run directory: its lock and `status.json` |
"""
