"""TensorBoard: `tracker` decides what is recorded, `event_file` writes and reads the records."""
