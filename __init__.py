"""`eclipse`: from image URLs to a text-to-image prior, and from a prior to pictures."""
