"""The backward pass: delta, dK and dV, dQ; configuration tables, launches."""
