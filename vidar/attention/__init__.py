"""Who sees whom, positions, attention kernels and the context cache."""
