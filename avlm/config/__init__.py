"""Typed, frozen settings: what a model is, what a run does. Nothing here needs torch."""
