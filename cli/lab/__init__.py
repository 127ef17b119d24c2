"""The laboratory: replay and bench, and all that they compare with. Nothing else imports it."""
