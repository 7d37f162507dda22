"""Times that a solve finds by itself."""
