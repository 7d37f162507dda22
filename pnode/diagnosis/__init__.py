"""Facts about an installation, and checks that judge them."""
