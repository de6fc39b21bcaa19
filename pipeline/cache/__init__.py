"""The embedding part and its memory-mapped reader."""
