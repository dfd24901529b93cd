"""Data generators and training of the small models that the package carries."""
