"""Checkpoint schedules, trajectories and discrete adjoints."""
