"""Networks: images in, images or logits out. Pure Linen modules; parameters are always passed in."""
