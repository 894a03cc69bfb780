"""Training: the only folder that knows Accelerate. Importing it imports nothing heavy."""
