from .panels import draw_comparison, draw_steps

__all__ = ['draw_comparison', 'draw_steps']
