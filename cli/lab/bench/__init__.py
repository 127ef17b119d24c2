"""`onelaunch bench`: the refresh and everything it is compared with, measured side by side in one run."""
