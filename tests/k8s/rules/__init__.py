"""Rules that every overlay keeps. Each is a function from an overlay's resources to what is wrong with them, in words."""
