"""Code as notebooks have it, one module for each topic; it runs in either library."""
