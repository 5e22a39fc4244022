"""One explanation on tensors: a plan (what is explained, and how) and images in, relevance and what led to it out."""
