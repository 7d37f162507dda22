"""The vector field and its derivatives: values, products, by time, at a start."""
