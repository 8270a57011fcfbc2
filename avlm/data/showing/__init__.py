"""A page that shows and plays samples."""
