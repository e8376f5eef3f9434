from .image_folders import ImageFolders
from .transforms import LoadImage, PackImage, RandomResizedCrop

__all__ = ['ImageFolders', 'LoadImage', 'PackImage', 'RandomResizedCrop']
