"""Networks that MONAI lacks, and what it takes to load and bind one. Sees neither attacks nor the workshop."""

if __name__ != "medrobust.networks":
    raise ImportError(f"import medrobust.networks, not {__name__}: a second copy of every class would appear")
