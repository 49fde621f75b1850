"""`autoretouch data audit`: finds faults in folders of pairs before time is spent on training."""
