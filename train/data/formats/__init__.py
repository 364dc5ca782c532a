"""File formats of boxes, masks and panoptic maps: one file a family, functions of plain NumPy arrays in both
directions."""
