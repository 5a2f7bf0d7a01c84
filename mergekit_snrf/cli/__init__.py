"""Thin click commands without logic of their own."""
