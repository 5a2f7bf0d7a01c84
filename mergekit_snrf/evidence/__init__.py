"""What a mask contains, whether its neurons matter, and whether a merge beats what is easier."""
