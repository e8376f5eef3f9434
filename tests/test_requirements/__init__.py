import sys
from pathlib import Path

# the scripts beside the requirements run before anything is installed, so they are no package
sys.path.insert(0, str(Path(__file__).parents[2] / 'requirements'))
