"""Files in, pixels and waveforms out, under limits; and what their headers say of them without decoding."""
