"""Adaptations without weights: ControlNets, T2I-Adapters and IP-Adapters, with their maps and pictures."""
