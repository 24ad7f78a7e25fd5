"""The size of a block, and how many values are decoded at a time. Torch-free."""

BLOCK = 256
SMALLEST = 4096  # minimum number of values of a matrix whose moments are quantized
AT_ONCE = 2**22  # number of values whose moments are decoded at a time
