"""A solve as torch differentiates it: backward, tangents, second derivatives."""
