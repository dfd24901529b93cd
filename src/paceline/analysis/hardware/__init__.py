"""What machine this is: the host as the engine may use it, and (later) a catalogue of machines as data files."""
