"""How speed and accuracy are measured."""
