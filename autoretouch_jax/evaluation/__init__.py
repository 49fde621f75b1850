"""A model and pairs in, numbers and pictures out."""
