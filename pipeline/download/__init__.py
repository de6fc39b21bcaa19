"""From URLs to image shards."""
