"""Trained networks in use: what a run or an exported file becomes outside of training.

| file | what it contains |
| --- | --- |
| `loading` | `load_model`: the network of a file, folder or run |
| `config` | what such a file says of its network, validated |
| `evaluation` | accuracy and loss by class, equal to those of the training run |
"""
