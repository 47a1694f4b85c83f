"""Accelerators: how they are named, what their sessions need, and how a session proves that it runs there.

``table`` lists them, ``cann`` has the options of the CANN provider; ``child`` keeps each session in a process of its
own (messages: ``channel``), where ``checked`` makes it and ``placement`` proves it.
"""

from calib.devices.table import ACCELERATORS, CPU, Accelerator, Device

__all__ = ["ACCELERATORS", "CPU", "Accelerator", "Device"]
