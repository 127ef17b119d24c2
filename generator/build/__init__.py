"""From source to shared object: the compilers, the build, and the binary it gives."""
