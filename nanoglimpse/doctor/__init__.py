"""What of the engine works on a GPU: kernels compiled without one, and checked on one."""
