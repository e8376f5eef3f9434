import sys
from pathlib import Path

# the setup scripts run before anything is installed, so they are not part of a package
sys.path.insert(0, str(Path(__file__).parents[2] / 'requirements'))
