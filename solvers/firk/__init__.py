"""Fully implicit Runge-Kutta methods: all stages of a step are solved for at once."""
