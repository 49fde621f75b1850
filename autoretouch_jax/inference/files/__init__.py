"""Photograph files: how each format stores pixels and metadata, and how they are written back."""
