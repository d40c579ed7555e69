"""The method as a library: what chooses, drops, fuses and merges tokens, in timm's vision transformers."""
