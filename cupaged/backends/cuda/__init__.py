"""The CUDA backend: kernels that NVRTC compiles and CuPy loads."""
