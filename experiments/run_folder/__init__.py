"""A run's folder: its files, who works in it, how far it is. Without torch."""
