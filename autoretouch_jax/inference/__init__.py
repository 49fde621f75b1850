"""A model and photos in, photos out."""
