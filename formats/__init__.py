"""How images are stored: image files, LMDB databases, label maps."""
