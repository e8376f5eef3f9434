from .feature_panels import draw_features, draw_steps
from .report import write_report

__all__ = ['draw_features', 'draw_steps', 'write_report']
