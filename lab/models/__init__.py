"""Small trained weights that ship with the project; see the model card beside them."""
