"""DeepSpeed as an engine: ZeRO, and its offload to host memory and NVMe."""
