import os


class Attack:
    """Object whose pickle runs code: unpickling it creates a folder.

    Args:
        path (str): Folder to create.
    """

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)
