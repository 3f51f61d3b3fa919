"""Records to tokens: sources -> records -> chat -> template -> replies -> encoding."""
