"""Speed claims as scripts, each beside its peer."""
