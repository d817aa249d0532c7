"""What several tests share: real kernels and real notebooks."""
