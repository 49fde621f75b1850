"""`autoretouch plan`: predicts what a config's step needs on machines that are not here."""
