"""Jacobians of implicit methods: the linearizations, and the matrices they become."""
