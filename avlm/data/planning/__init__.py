"""The order of the data as a pure function: shuffles, packs, ranks, and the state of a stage."""
