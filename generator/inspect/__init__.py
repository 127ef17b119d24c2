"""What people ask of kernels: what they are, how they differ, why they are built."""
