"""Weight files on disk: finding them, reading and hashing them as they stream, writing them whole."""
