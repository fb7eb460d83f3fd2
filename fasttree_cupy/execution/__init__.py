"""Execution: planned metadata and Q, K, V in, O out; on CUDA or on the CPU. Knows nothing of trees."""
