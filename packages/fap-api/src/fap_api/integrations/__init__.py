"""Other software on these kernels, without a change to its code. Nothing here acts before it is called."""
