"""Using a model: decoding and conversations."""
