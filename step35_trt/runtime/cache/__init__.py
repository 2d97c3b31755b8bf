"""Pages of keys and values: whose they are, and what later sequences find again."""
