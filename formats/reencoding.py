"""Image files re-encoded at the size at which training crops them."""
import io
from typing import NamedTuple

from PIL import Image

from formats.decoding import decode_picture


class Reencoding(NamedTuple):
    """Called with the bytes of an image file and a function for its place: → bytes of a JPEG with a shorter side of
    `short_side` pixels, or the same bytes if its shorter side is not longer.

    Raises DataError if the image does not decode, as `decode_picture` does.
    """
    short_side: int
    quality: int

    def __call__(self, data, where):
        picture = decode_picture(data, where)
        shorter = min(picture.size)
        if shorter <= self.short_side:
            return data
        size = [round(side * self.short_side / shorter) for side in picture.size]
        file = io.BytesIO()
        picture.resize(size, Image.Resampling.BICUBIC).save(file, 'JPEG', quality=self.quality)
        return file.getvalue()

    def __str__(self):
        return f're-encoded to a shorter side of {self.short_side} pixels at most, JPEG quality {self.quality}'
