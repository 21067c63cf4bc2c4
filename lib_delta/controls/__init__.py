"""Adaptations that are not weights: ControlNets, T2I-Adapters and IP-Adapters, and what they look at."""
