"""From the cache to a prior."""
