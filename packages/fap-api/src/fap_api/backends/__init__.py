"""Back ends of the functional API, each calling one implementation of attention."""
