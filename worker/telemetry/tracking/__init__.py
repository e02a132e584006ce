"""Trackers that show a node's figures by round: trackio, Weights & Biases, TensorBoard."""
