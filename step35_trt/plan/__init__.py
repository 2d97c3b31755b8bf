"""What a model takes on a machine and how fast it could be, from `config.json` and an engine spec alone."""
