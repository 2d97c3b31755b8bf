"""Recipes applied to weights."""
