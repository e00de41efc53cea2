"""Scores of generated images: features of a network, and measures on the features."""
