"""Batches in, a trained state out."""
