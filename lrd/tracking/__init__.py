"""What a run records.

| file | what it contains |
| --- | --- |
| `recorder` | computes the values of each step, on every rank |
| `tracker` | writes them on the main process, under which tags |
| `pages` | what TensorBoard shows beside curves: charts, HParams, text, histograms |
| `event_file` | TensorBoard's files: a writer and a reader |
| `metrics_file` | `metrics.csv`, the same values as a table |
| `lost_records` | finds the steps whose records are lost |
"""
