"""The small verbs: `doctor`, `bench` and `models`."""
