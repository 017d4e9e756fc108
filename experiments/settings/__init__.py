"""The settings of a run, and the protocols that set them."""
