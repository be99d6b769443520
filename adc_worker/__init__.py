"""A worker for Antenna that measures each job and feeds the GPU inside the memory this machine has."""

from importlib.metadata import version

__version__ = version("adc-worker")
