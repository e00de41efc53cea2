"""Data: what a model is trained on, and where training stands in it."""
