"""EAGLE-1, EAGLE-2 and HASS for specforge; registered, but contributing no algorithm yet."""
