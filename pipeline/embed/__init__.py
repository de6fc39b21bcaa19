"""From image shards to CLIP features."""
