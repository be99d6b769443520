"""A worker for Antenna that measures each job and feeds the GPU inside the memory this machine has."""

__version__ = "0.1.0"
