"""The families of HuggingFace models that come with the package, one file each; `registry.FAMILIES` lists them."""
