"""`autoretouch data audit`: what is wrong with a folder of pairs, before time is spent on training."""
