"""The model: loading, sizing, prompt forms, log-probabilities, LoRA and memory."""
