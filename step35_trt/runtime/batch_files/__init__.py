"""OpenAI's batch files, on one machine or many."""
