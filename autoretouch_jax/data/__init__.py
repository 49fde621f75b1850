"""Files in, batches of training crops out."""
