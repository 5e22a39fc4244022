"""Where a model's blocks, patches and pooling are, and how its blocks are called: one file a model family."""
