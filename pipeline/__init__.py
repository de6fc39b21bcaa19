"""From image URLs to a filtered cache of CLIP features."""
