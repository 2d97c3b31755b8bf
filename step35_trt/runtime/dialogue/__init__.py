"""Text, chat messages and OpenAI's requests, in and out."""
