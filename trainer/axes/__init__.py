"""One file per technique: what moves where, drawn, and the function that applies it to a plain Hugging Face model."""
