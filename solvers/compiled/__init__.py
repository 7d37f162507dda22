"""Fields, steps and whole sweeps as machine code."""
