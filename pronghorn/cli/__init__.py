"""The ``pronghorn`` command: one thin file a command."""
