"""The CUDA kernels on a CPU: their sources, translated to C++, on a machine whose threads take turns by a seed."""
