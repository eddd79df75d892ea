"""Read datasets for training: the plan of an epoch, records as arrays, batches."""
