"""Processes that work for this one and can be killed."""
