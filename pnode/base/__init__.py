"""What everything else stands on: errors, options, devices, vectors, ranks, counts."""
