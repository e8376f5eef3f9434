import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Iterator, List, Optional, Sequence, Union

import cv2
import torch
from mmengine.dataset import BaseDataset
from mmengine.logging import print_log

from mmdiffkd.registry import DATASETS
from mmdiffkd.utils.check_config import check_value

SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.pgm', '.png', '.ppm', '.tif', '.tiff', '.webp')
THREADS = 16  # number of threads that read the first bytes of files; most of the time, they wait for the disk


@DATASETS.register_module()
class ImageFolders(BaseDataset):
    """All images in one or more folders and their subfolders, without labels.

    Files that are no images, such as empty files, are left out when the folders are read. A file that turns out to be
    damaged when it is decoded is replaced by another image; ``broken_files`` lists these files. Hidden files and
    folders are left out.

    Args:
        folders (str or list[str]): The folders.
        pipeline (list[dict]): Transforms, from :class:`.LoadImage` to :class:`.PackImage`. Defaults to ``()``.
        **kwargs: Other arguments of mmengine's ``BaseDataset``.

    Raises:
        FileNotFoundError: If a folder does not exist.
        ValueError: If the folders have no images.
    """

    def __init__(self, folders: Union[str, Sequence[str]], pipeline: Sequence[dict] = (), **kwargs):
        check_value('folders', folders, Union[str, Sequence[str]])
        self.folders = [folders] if isinstance(folders, str) else list(folders)
        self._broken: Optional[torch.Tensor] = None  # in shared memory, because worker processes find broken files
        super().__init__(pipeline=list(pipeline), **kwargs)

    def load_data_list(self) -> List[dict]:
        """List the images, in the order of their paths."""
        files = [file for folder in self.folders for file in _find_files(folder)]
        with ThreadPoolExecutor(THREADS) as pool:
            are_images = list(pool.map(_is_image, files))
        images = [file for file, is_image in zip(files, are_images) if is_image]
        others = [file for file, is_image in zip(files, are_images) if not is_image]
        names = ', '.join(f"'{folder}'" for folder in self.folders)
        if not images:
            found = f'all {len(others)} files with these suffixes are damaged' if others else 'there are no such files'
            raise ValueError(
                f'No images in {names}: images are files with the suffixes {", ".join(SUFFIXES)}, and {found}.'
            )
        skipped = f' Skipped {len(others)} files that are no images, such as {others[0]}.' if others else ''
        print_log(f'{len(images)} images in {names}.{skipped}', logger='current')
        return [dict(img_path=file) for file in images]

    def full_init(self) -> None:
        """Read the folders."""
        super().full_init()
        if self._broken is None:
            self._broken = torch.zeros(len(self), dtype=torch.bool).share_memory_()

    def prepare_data(self, idx: int) -> Optional[dict]:
        """Return an image, or None if it cannot be decoded. mmengine then loads a different image."""
        data = super().prepare_data(idx)
        if data is None:
            self._broken[idx] = True
        return data

    @property
    def broken_files(self) -> List[str]:
        """Files that could not be decoded so far."""
        found = [] if self._broken is None else self._broken.nonzero().flatten().tolist()
        return [self.get_data_info(idx)['img_path'] for idx in found]


def _find_files(folder: str) -> Iterator[str]:
    """Yield the files in a folder with the suffix of an image, in the order of their paths. Links are followed."""
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"The folder '{folder}' does not exist (working directory: {os.getcwd()}).")
    visited = set()
    for path, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(path)
        if real in visited:  # a link to a folder that contains the link
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith('.'))
        for name in sorted(files):
            if not name.startswith('.') and Path(name).suffix.lower() in SUFFIXES:
                yield os.path.join(path, name)


def _is_image(file: str) -> bool:
    """Return whether a file starts like an image. Reading whole files would take long, so the rest is not checked."""
    try:
        return cv2.haveImageReader(file)
    except cv2.error:
        return False
