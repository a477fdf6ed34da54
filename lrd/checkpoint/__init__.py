"""The training state on disk.

| file | what it contains |
| --- | --- |
| `store` | write, verify, find, keep and delete checkpoints |
| `manifest` | size and SHA-256 of each file of a checkpoint |
| `async_writer` | write checkpoints in the background while training goes on |
| `network_config` | what inference needs to know of a network |
| `export` | a checkpoint's weights for use outside of the run |
| `transfer` | copy the newest checkpoint from another host to rank 0's |
| `mirror` | copies in an object store, a folder of its own |
| `run_dir` | the run directory: its lock and `status.json` |
| `run_records` | what the files of a run directory say about the run |
"""
