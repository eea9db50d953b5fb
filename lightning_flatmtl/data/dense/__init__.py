"""Images with a target for every pixel: segmentation, depth, surface normals."""
