"""The closed world: shapes whose pictures can be checked by pixel, and the small models that live in it."""
