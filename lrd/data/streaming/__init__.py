"""Images that worker processes read when they are needed, from files, a pack, or the user's code.

| module | what it holds |
| --- | --- |
| `folders` | a folder of images, as files or packed, as a data set |
| `file_index` | the list of a folder's files, kept beside it |
| `packing`, `packed` | images decoded and resized once: written, and read |
| `sources` | where images come from: files or a pack |
| `readers` | what a worker does for one image |
| `augmentation` | random changes to one training image |
| `own`, `own_reader` | map-style data sets of the user's own |
| `loader` | worker processes that read batches ahead of need |
| `streamed` | a part of a data set, and its training batches |
"""
