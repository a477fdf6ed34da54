"""Training and test data.

| module | what it holds |
| --- | --- |
| `datasets` | data sets in memory, and how each of them is loaded |
| `image_folder` | a folder of image files, decoded once and cached |
| `folder_lock` | a lock that lets one process at a time download or decode |
| `batches` | training batches as functions of a position |
"""
