"""Where a run takes place: devices and collectives, processes and their watch, storage, and the request to stop."""
