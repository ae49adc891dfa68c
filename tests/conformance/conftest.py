# --doctest-modules would import it, and importing it changes timm's registry.
collect_ignore = ["timm_shim.py"]
