"""The model, its losses, and one fold from the first step to its predictions."""
