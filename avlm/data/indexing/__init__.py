"""What each row takes of a row and of the encoders, counted once from headers and texts."""
