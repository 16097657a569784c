"""What stands in the trained SAE's place to see whether a result needs it: control SAEs, and methods that are no SAEs."""
