"""What a solve returns: shown, kept and exported."""
