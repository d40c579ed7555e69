"""Write Fashion-MNIST (Xiao et al., 2017) as an image folder: train/CLASS/NUMBER.png and val/CLASS/NUMBER.png.

    apt install dataset-fashion-mnist && python docs/fashion_mnist.py fashion
"""
import argparse
import gzip
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ('t-shirt', 'trouser', 'pullover', 'dress', 'coat', 'sandal', 'shirt', 'sneaker', 'bag', 'ankle-boot')


def read_idx(path, header):
    """The bytes of an IDX file after a header of so many bytes."""
    with gzip.open(path) as file:
        return np.frombuffer(file.read(), np.uint8, offset=header)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('folder', type=Path, help='where to write')
    parser.add_argument('--source', type=Path, default='/usr/share/datasets/fashion-mnist',
                        help='folder with the four .gz files (default: that of the Debian package)')
    args = parser.parse_args()
    for split, name in (('train', 'train'), ('val', 't10k')):
        images = read_idx(args.source / f'{name}-images-idx3-ubyte.gz', 16).reshape(-1, 28, 28)
        labels = read_idx(args.source / f'{name}-labels-idx1-ubyte.gz', 8)
        for label in CLASSES:
            (args.folder / split / label).mkdir(parents=True, exist_ok=True)
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            Image.fromarray(image).save(args.folder / split / CLASSES[label] / f'{i:05}.png')


if __name__ == '__main__':
    main()
