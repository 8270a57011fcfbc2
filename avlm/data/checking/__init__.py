"""What is wrong with a data set, and what a training run would make of it."""
