"""4-bit NormalFloat weights: the tensor, the linear layer, and the way to and from the bitsandbytes format."""
