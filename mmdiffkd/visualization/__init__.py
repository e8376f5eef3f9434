from .feature_panels import draw_comparison, draw_steps
from .report import write_report

__all__ = ['draw_comparison', 'draw_steps', 'write_report']
