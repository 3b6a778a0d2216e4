"""Maths on images and volumes: block DCT, quantisation, structural similarity, intensities. The leaf room."""

if __name__ != "medrobust.transforms":
    raise ImportError(f"import medrobust.transforms, not {__name__}: a second copy of every class would appear")
