"""Muon: momentum whose matrices are orthogonalised (Jordan 2024), and AdamW for everything else."""
