"""Words with vectors of their own."""
