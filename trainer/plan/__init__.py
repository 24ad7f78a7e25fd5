"""The run as plain numbers, decided before it starts. No torch."""
