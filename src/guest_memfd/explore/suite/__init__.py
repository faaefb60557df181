"""Which scenarios a verdict takes, and who works them off."""
