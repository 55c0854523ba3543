"""The autotuner: measures schedules where predictions cannot tell them apart, and remembers what it found.

`space` what may be tried and why not; `measure` timing with cold weights; `worker` the process that does it, and
`process` what watches it; `database` what was found, by device; `tuner` a whole run under a budget. Choosing a kernel
(`codegen.select`) only ever reads the database.
"""
