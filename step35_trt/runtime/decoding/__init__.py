"""From a prompt to tokens: drafting, verification, sampling."""
