"""Measuring: scorers, and the runner with its look-and-listen check."""
