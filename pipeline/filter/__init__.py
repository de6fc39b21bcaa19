"""Which rows are kept: rules and copies."""
