"""A model as one file for other software."""
