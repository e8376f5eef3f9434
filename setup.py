import shutil
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
bdist_wheel = Distribution().get_command_class('bdist_wheel')  # of setuptools 70.1 and newer, or of the package wheel


def requirements(name):
    lines = (ROOT / 'requirements' / name).read_text().splitlines()
    return [line.split('#')[0].strip() for line in lines if line.split('#')[0].strip()]


def version():
    return (ROOT / 'mmdiffkd' / 'version.py').read_text().split("'")[1]


def copy_mim(folder):
    """Copy the files that mim looks for in an installed package, and remove files of earlier builds."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in ('configs', 'tools'):  # leave out weights: the demo of an installed package trains its teacher
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns('__pycache__', '*.pth'))
    shutil.copy2(ROOT / 'model-index.yml', folder)


class BuildPackage(build_py):
    """Build the package with the folder ``.mim``, which contains configs and tools.

    Editable installs have no ``.mim``: onedl-mim searches the whole repository, and refuses configs found twice.
    """

    def run(self):
        super().run()
        if not self.editable_mode:
            copy_mim(Path(self.build_lib, 'mmdiffkd', '.mim'))


class BuildWheel(bdist_wheel):
    """Build a wheel with ``.mim`` in two folders.

    openmim searches the folder of the package. onedl-mim searches the folder of the first file that pip recorded, which
    is the ``.dist-info`` folder if package and distribution have the same name.
    """

    def write_wheelfile(self, wheelfile_base, **kwargs):
        super().write_wheelfile(wheelfile_base, **kwargs)
        packed = Path(self.bdist_dir, 'mmdiffkd', '.mim')
        if packed.is_dir():  # an editable install has no .mim
            shutil.copytree(packed, Path(wheelfile_base, '.mim'))


setup(
    name='mmdiffkd',
    version=version(),
    description='DiffKD: denoised feature distillation for mmdet, mmseg and mmpretrain models',
    long_description=(ROOT / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    author='The mmdiffkd authors',
    license='Apache-2.0',
    keywords=[
        'knowledge distillation',
        'diffusion model',
        'model compression',
        'object detection',
        'semantic segmentation',
        'image classification',
        'OpenMMLab',
    ],
    classifiers=[
        'Development Status :: 4 - Beta',
        'Intended Audience :: Developers',
        'Intended Audience :: Science/Research',
        'Operating System :: POSIX :: Linux',
        'Programming Language :: Python :: 3',
        'Programming Language :: Python :: 3 :: Only',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Topic :: Scientific/Engineering :: Image Recognition',
    ],
    packages=find_packages(include=['mmdiffkd', 'mmdiffkd.*']),
    package_data={'mmdiffkd': ['visualization/*.html']},
    python_requires='>=3.11',
    install_requires=requirements('runtime.txt'),
    extras_require={
        'docs': requirements('docs.txt'),
        'tests': requirements('tests.txt'),
        'timm': requirements('timm.txt'),
        'transformers': requirements('transformers.txt'),
    },
    cmdclass=dict(build_py=BuildPackage, bdist_wheel=BuildWheel),
)
