"""What will happen, as plain numbers. No torch."""
