"""A model and photographs in, photographs out."""
