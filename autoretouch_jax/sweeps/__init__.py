"""`autoretouch sweep`: a search over a space of config values."""
