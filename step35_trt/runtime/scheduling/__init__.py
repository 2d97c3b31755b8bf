"""Many requests at once over one session."""
