import os


class Attack:
    """Code in a pickle: it makes a folder when it is read.

    Args:
        path (str): The folder.
    """

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)
