"""`autoretouch demo`: a small model that learns to remove blemishes, from data that the program makes."""
