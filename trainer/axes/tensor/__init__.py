"""Tensor parallel: matrices cut over ranks, and the collectives between them."""
