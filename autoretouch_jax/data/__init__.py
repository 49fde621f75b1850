"""Files in, batches on devices out."""
