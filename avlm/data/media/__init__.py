"""What encoders take of decoded media: tiles and patches of pictures, features of sounds."""
