"""Checkpoints off the machine: a copy in an object store, with `checkpoint.mirror`.

| file | what it contains |
| --- | --- |
| `remote` | the object store: requests with limits of time, errors in one line |
| `layout` | the names of the objects, and which checkpoints are whole |
| `claim` | which run a mirror belongs to, and that one start at a time uses it |
| `uploader` | the thread that copies checkpoints and records to the mirror |
| `fetching` | copy the newest checkpoint from the mirror, verify and publish it |
"""
