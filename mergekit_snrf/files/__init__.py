"""Files: guarded reading, whole or no writing, and the container of masks, profiles and results."""
