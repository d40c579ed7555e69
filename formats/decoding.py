"""From image files to pictures."""
import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from runtime.utils import DataError, one_line


def read_file(path):
    """Bytes of a file; DataError, naming it, if it cannot be read."""
    try:
        with open(path, 'rb', buffering=0) as file:
            return file.read()
    except OSError as error:
        raise DataError(f'{path} cannot be read: {error.strerror}') from error


def decode_picture(data, where):
    """Bytes of an image file of any mode and format that Pillow reads → RGB picture.

    Args:
        data: bytes.
        where: function that returns the image's place, for messages.
    Raises:
        DataError: the data do not decode; the message begins with `where()`.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return to_rgb(image)
    except Exception as error:                         # Pillow's decoders raise nearly anything on broken data
        raise undecodable(where(), error) from error


def to_rgb(image):
    """A loaded picture of any mode → RGB picture.

    16-bit grey values become 8-bit ones, 257 to 1 (Pillow would cut them off at 255). Transparency is dropped: a pixel
    has the colour that the file stores for it, whatever its alpha. CMYK is converted without a colour profile.

    Raises:
        ValueError: the range of the values is unknown, as of 32-bit integers and floats.
    """
    if image.mode == 'RGB':
        return image
    bits = image.tag_v2.get(258, (16,))[0] if image.format == 'TIFF' else 16           # a TIFF's BitsPerSample
    is_grey16 = image.mode.startswith('I;16') and bits == 16
    if is_grey16 or image.mode == 'I' and image.format in ('PNG', 'PPM'):              # which have at most 16 bits
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    elif image.mode[0] in 'IF':
        raise ValueError(f"the range of its values is unknown (Pillow's mode {image.mode}); save it with 8 or 16 bits")
    image.info.pop('transparency', None)               # of a palette, Pillow would warn
    return image.convert('RGB')


def undecodable(where, error):
    """The DataError about an image that failed to decode with `error`."""
    # Pillow's own text of this error names an object in memory
    unknown = isinstance(error, UnidentifiedImageError)
    return DataError(f'{where} does not decode: {"no image format of Pillow" if unknown else one_line(error)}')


def load_image(path, decode=decode_picture):
    """Read and decode an image file; DataError, naming the file, if that fails."""
    return decode(read_file(path), lambda: path)
