"""The MLP speculator for specforge; registered, but contributing no algorithm yet."""
