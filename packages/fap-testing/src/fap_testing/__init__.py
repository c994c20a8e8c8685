"""Test attention implementations against a float64 oracle. Import what you need from the submodules.

Importing this package imports neither torch nor pytest.
"""
