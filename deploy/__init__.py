"""What installs and runs Canopy: the agent bundle, units, test hosts, the demo."""
