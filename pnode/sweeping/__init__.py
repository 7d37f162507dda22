"""One sweep: forwards and backwards over recorded steps, and what observes it."""
