from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def requirements(name):
    lines = (ROOT / 'requirements' / name).read_text().splitlines()
    return [line.split('#')[0].strip() for line in lines if line.split('#')[0].strip()]


def version():
    return (ROOT / 'mmdiffkd' / 'version.py').read_text().split("'")[1]


setup(
    name='mmdiffkd',
    version=version(),
    description='DiffKD: denoised feature distillation for mmdet, mmseg and mmpretrain models',
    long_description=(ROOT / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    packages=find_packages(include=['mmdiffkd', 'mmdiffkd.*']),
    python_requires='>=3.10',
    install_requires=requirements('runtime.txt'),
    extras_require=dict(tests=requirements('tests.txt')),
)
