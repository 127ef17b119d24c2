"""What a kernel is: fields, configuration, parameters, and what every field means in plain PyTorch."""
