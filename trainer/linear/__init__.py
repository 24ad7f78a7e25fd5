"""What a linear layer is: plain, with an adapter, or stored in 4 bits."""
