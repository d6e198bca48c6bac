"""The fused kernels: device code, launch configurations, launches and the registered operators."""
