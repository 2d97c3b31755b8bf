"""How fast a bundle answers: a load, what its requests went through, and what that comes to."""
