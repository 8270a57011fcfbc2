"""What is counted of a run beside its loss, and who else is told."""
