"""Slow, independent implementations that the tests compare with. Nothing here imports csvfast."""
