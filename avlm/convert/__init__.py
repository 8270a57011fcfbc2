"""Models from parts, and model directories in and out."""
