"""From image files to pictures."""
import io

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
            return image if image.mode == 'RGB' else image.convert('RGB')              # convert copies in any case
    except Exception as error:                         # Pillow's decoders raise nearly anything on broken data
        raise undecodable(where(), error) from error


def undecodable(where, error):
    """The DataError about an image that failed to decode with `error`."""
    # Pillow's own text of this error names an object in memory
    unknown = isinstance(error, UnidentifiedImageError)
    return DataError(f'{where} does not decode: {"no image format of Pillow" if unknown else one_line(error)}')


def load_image(path, decode=decode_picture):
    """Read and decode an image file; DataError, naming the file, if that fails."""
    return decode(read_file(path), lambda: path)
