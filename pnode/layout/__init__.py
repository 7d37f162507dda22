"""How a state is laid out over ranks, and its copies in ghost cells."""
