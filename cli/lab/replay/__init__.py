"""`onelaunch replay`: a simulated serving run, with every refresh checked against the reference."""
