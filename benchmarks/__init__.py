"""Benchmarks of torch_fff against the strongest layers a user could pick instead; see README.md."""
