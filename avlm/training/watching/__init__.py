"""What goes wrong in a run while it goes: numbers that are none, losses that jump, steps that never end."""
