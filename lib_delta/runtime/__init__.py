"""The side model in memory: loaded, adapted, moved between devices."""
