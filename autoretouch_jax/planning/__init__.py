"""`autoretouch plan`: what a config's step needs on machines that are not here."""
