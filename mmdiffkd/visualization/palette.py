"""Colors of all panels and charts. Feature maps get their colors from ``feature_panels.FeatureColors`` instead."""

# Okabe-Ito colors, which color-blind readers can distinguish. Yellow is left out, because it is too light for lines.
COLORS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9')
STYLES = ('-', (0, (5, 1.5)), (0, (1.5, 1.5)), (0, (5, 1.5, 1.5, 1.5)))
REFERENCE = '#4a4a4a'  # reference lines
INK, SOFT, GRID = '#22303c', '#5c6b78', '#e3e8ec'  # titles, secondary text, grid lines
ERROR_COLORMAP = 'magma'  # matplotlib colormap of error maps, from black (no error) to bright (largest error)
