"""The forward pass: kernel, configuration table, launch."""
