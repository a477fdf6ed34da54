"""What a run records.

| file | what it contains |
| --- | --- |
| `tracker` | which values are recorded, and under which tags |
| `pages` | what TensorBoard shows beside curves: charts, HParams, text, histograms |
| `event_file` | TensorBoard's files: a writer and a reader |
| `metrics_file` | `metrics.csv`, the same values as a table |
| `lost_records` | finds the steps whose records are lost |
"""
