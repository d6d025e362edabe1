"""Engines that run the frozen base model: one file each, behind the protocol of `backend.py`."""
