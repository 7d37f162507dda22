"""What a solve is given: the problem, its mass matrix and tolerances, the state a user holds."""
