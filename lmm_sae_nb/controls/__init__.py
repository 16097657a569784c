"""What stands in the trained SAE's place to see whether a result needs it: control SAEs, and methods without an SAE.

Read in this order: `dictionaries` (control SAEs), `chain` (the metrics of notebooks 01 to 07 for one SAE),
`directions` (detect concepts by a difference of means and by logistic probes), `direction_steering` (steer by these
directions, and by a prompt), `kind_steering` (steer towards concepts of every kind).
"""
