"""Tables that people keep: reading them, and which names in them mean the same."""
