"""Exact attention modules for PyTorch, on top of fap_api."""
