"""Training: advantages and loss, the batch, the step, micro-batches and checkpoints."""
