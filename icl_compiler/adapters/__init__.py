"""Thin bridges to other libraries, one a file; each imports its library, and nothing here imports them."""
