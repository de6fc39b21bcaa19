"""Pictures and the tars they lie in."""
