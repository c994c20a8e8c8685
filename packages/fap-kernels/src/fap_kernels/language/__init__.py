"""The words that attention kernels are written in: @triton.jit functions that launch nothing.

Forward and backward kernels are sentences of these words, so a feature is defined once:

    rows      where the rows of a tensor lie, and how a tile of them is loaded or stored
    parts     a tile whose head dimension is held as power-of-two parts
    tiles     which tiles a tile must visit, and which of those need a mask
    masks     which key a query may see
    scores    from q @ k^T to logits, each function beside its derivative
    softmax   the online softmax: step and finish
    dropout   which weights survive, keyed on absolute positions
    spans     which rows are a batch entry's: its own, packed, or in a cache
    rotary    rows turned by the angles of their positions
    grid      kernels that overlap with the one before

Values that travel together are NamedTuples; a field that is None is a feature that is absent, and
costs nothing in the compiled kernel.
"""
