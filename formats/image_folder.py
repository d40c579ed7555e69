"""A tree of image files, one folder for each class."""
import collections
import functools
import os
from pathlib import Path

import torchvision
from torchvision.datasets.folder import IMG_EXTENSIONS

from runtime.distributed import log
from runtime.utils import InputError

# Beside the hidden ones: what file systems, NAS boxes and archives leave among images
SYSTEM_FOLDERS = {'@eaDir', '#recycle', '@Recycle', '__MACOSX', '$RECYCLE.BIN', 'System Volume Information',
                  'lost+found'}


class ImageFolder(torchvision.datasets.ImageFolder):
    """torchvision's ImageFolder: `<root>/<class>/…/<image>`, the same images in the same order.

    Modifications: hidden folders and those of the system are no classes; they, and hidden files, have no images.
    Links to a folder above are not followed. What is left out is reported once.

    Raises:
        InputError: there is no class, or one without images.
    """

    def __init__(self, root, *args, **kwargs):
        self.left_out, self.skipped = collections.Counter(), set()         # names of files, and of folders
        try:
            super().__init__(root, *args, **kwargs)
        except FileNotFoundError as error:
            raise InputError(str(error).splitlines()[0]) from None
        if self.left_out or self.skipped:
            log_once(f'note: {self.root}: {self.describe_left_out()}')

    def find_classes(self, directory):
        """The names of the classes, sorted, and their numbers."""
        above, classes = ids_above(directory), []
        for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
            if entry.is_dir() and self.is_served(entry.path, above):
                classes.append(entry.name)
            elif not entry.is_dir():
                self.left_out[kind_of(entry.name)] += 1
        if not classes:
            raise FileNotFoundError(f'{directory} has no folders of classes; {directory}/<class>/<image> is expected')
        return classes, {name: i for i, name in enumerate(classes)}

    def make_dataset(self, directory, class_to_idx, *_, **__):
        """[(path, label)] in the order of torchvision."""
        samples = []
        for name, label in class_to_idx.items():
            number = len(samples)
            for folder, files in sorted(self.walk(os.path.join(directory, name))):
                for file in sorted(files):
                    if not is_hidden(file) and file.lower().endswith(IMG_EXTENSIONS):
                        samples.append((os.path.join(folder, file), label))
                    else:
                        self.left_out[kind_of(file)] += 1
            if len(samples) == number:
                raise FileNotFoundError(f'{directory}/{name} has no image; names end in {", ".join(IMG_EXTENSIONS)}')
        return samples

    def walk(self, top):
        """Yield (folder, names of files) of a class, links included."""
        above = {top: ids_above(top)}
        for folder, folders, files in os.walk(top, followlinks=True):
            yield folder, files
            ids = above.pop(folder)
            folders[:] = [name for name in folders if self.is_served(os.path.join(folder, name), ids)]
            for path in (os.path.join(folder, name) for name in folders):
                above[path] = ids | (ids_above(path) if os.path.islink(path) else {id_of(path)})

    def is_served(self, path, above):
        """Whether to look for images in a folder; `above` are the ids of the folders above."""
        name = os.path.basename(path)
        if is_hidden(name) or name in SYSTEM_FOLDERS or os.path.islink(path) and id_of(path) in above:
            self.skipped.add(name)
            return False
        return True

    def describe_left_out(self):
        """What was left out, in words."""
        parts = []
        if self.left_out:
            kinds = ', '.join(f'{number:,} {kind}' for kind, number in self.left_out.most_common(6))
            more = ', …' if len(self.left_out) > 6 else ''
            parts.append(f'{sum(self.left_out.values()):,} files are left out, whose names do not end as those of '
                         f'images, or which are in no class: {kinds}{more}')
        if self.skipped:
            names = ', '.join(sorted(self.skipped)[:6]) + (', …' if len(self.skipped) > 6 else '')
            parts.append(f'folders left out, as hidden, of the system, or links to a folder above: {names}')
        return '; '.join(parts)


log_once = functools.cache(log)


def is_hidden(name):
    return name.startswith('.')


def kind_of(name):
    """The suffix of a file's name, or the whole name if it is hidden or has none; '._*' for those of macOS."""
    return '._*' if name.startswith('._') else os.path.splitext(name)[1].lower() or name


def id_of(path):
    """What identifies a folder, whatever links lead to it."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def ids_above(path):
    """The ids of a folder and of all folders above, by its path and by the place where links lead."""
    real, given = Path(os.path.realpath(path)), Path(os.path.abspath(path))
    return {id_of(one) for one in (real, *real.parents, *given.parents)}
