"""Callbacks; they know a module only through lit_generative.types."""
