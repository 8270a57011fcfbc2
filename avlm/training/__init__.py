"""Training: stages, the loop, checkpoints, and what people see of it."""
